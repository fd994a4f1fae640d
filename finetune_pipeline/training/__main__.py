"""python -m finetune_pipeline.training job.json: train one adapter and exit.

Exit status: 0 with a result.json; 2 if the job cannot be done (the last line of the output says why, after
`TRAINING FAILED: `); anything else is a fault.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.subprocess_lifetime import die_with_parent
from finetune_pipeline.training.backends import choose_backend
from finetune_pipeline.training.base_model import check_base_model, check_target_modules
from finetune_pipeline.training.hardware import cpu_quota, threads_per_process, usable_cores
from finetune_pipeline.training.job import (
    CHECKPOINTS,
    ENVIRONMENT,
    REFUSAL,
    REFUSED,
    JobConfig,
    TrainingError,
    finished,
)
from finetune_pipeline.training.memory import MemoryRanOut
from finetune_pipeline.training.trackers import set_tensorboard_folder


def main(arguments: list[str] | None = None) -> int:
    """Read the job, train, and return the exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m finetune_pipeline.training", description="Train one adapter.")
    parser.add_argument("job", type=Path, help="JSON file of a JobConfig")
    parser.add_argument("--parent", type=int, help="process id to die with; without it, training outlives its shell")
    parser.add_argument(
        "--micro-batch", type=int, help="micro-batch size, if memory ran out with per_device_train_batch_size"
    )
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    try:
        job = JobConfig.model_validate_json(options.job.read_bytes())
        check_base_model(job.base_model)
        set_tensorboard_folder(job.output)
        checkpoints = job.output / CHECKPOINTS
        checkpoints.mkdir(parents=True, exist_ok=True)
        # The lock ends with the process, and its file is removed with the checkpoints.
        with FileLock(checkpoints / "training.lock", timeout=0):
            if finished(job) is None:
                _train(job, started, options.micro_batch)
    except MemoryRanOut as error:
        print(error, file=sys.stderr, flush=True)
        # A fresh process under the same id: this one does not get back all memory that the failed step held.
        command = [sys.executable, "-u", "-m", "finetune_pipeline.training", str(options.job)]
        if options.parent is not None:
            command += ["--parent", str(options.parent)]
        os.execv(sys.executable, [*command, "--micro-batch", str(error.micro_batch)])
    except Timeout:
        print(
            f"{REFUSAL}another training run is writing to {job.output} now; wait until it has finished",
            file=sys.stderr,
            flush=True,
        )
        return REFUSED
    except (TrainingError, ClusterError, ValidationError, OSError) as error:
        print(f"{REFUSAL}{error}", file=sys.stderr, flush=True)
        return REFUSED
    return 0


def _train(job: JobConfig, started: float, micro_batch: int | None) -> None:
    backend, reason = choose_backend(job.settings)
    backend.validate(job.settings)
    print(f"backend {backend.name} ({reason})", flush=True)
    # Set before torch is loaded, and inherited by further processes; workers of a Ray cluster get theirs from Ray.
    threads = threads_per_process(usable_cores(), cpu_quota(), job.settings.num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    check_target_modules(job.base_model, job.settings)
    if job.settings.compute == "ray":
        from finetune_pipeline.training import ray_cluster

        ray_cluster.train(job, started)
    elif job.settings.num_processes > 1:
        from finetune_pipeline.training import elastic_launch

        elastic_launch.train(job, started)
    else:
        backend.run(job, started, micro_batch)


if __name__ == "__main__":
    sys.exit(main())
