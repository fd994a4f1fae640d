"""python -m finetune_pipeline.training job.json: train one adapter and end.

Exit status: 0 with a result.json; 2 when the job cannot be done (the last line of the output says why, after
`TRAINING FAILED: `); anything else is a fault.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from finetune_pipeline.children import die_with_parent
from finetune_pipeline.training.backends import choose
from finetune_pipeline.training.base_model import check_base_model
from finetune_pipeline.training.job import REFUSAL, REFUSED, TrainingError, TrainingJob, finished
from finetune_pipeline.training.process import ENVIRONMENT, folder_alone
from finetune_pipeline.training.trackers import settle_trackers


def main(arguments: list[str] | None = None) -> int:
    """Read the job, train, and return the exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m finetune_pipeline.training", description="Train one adapter.")
    parser.add_argument("job", type=Path, help="JSON file of a TrainingJob")
    parser.add_argument(
        "--parent", type=int, help="process id to die with; without it, the training outlives its shell"
    )
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    try:
        _run(TrainingJob.model_validate_json(options.job.read_bytes()), started)
    except (TrainingError, ValidationError, OSError) as error:
        print(f"{REFUSAL}{error}", file=sys.stderr, flush=True)
        return REFUSED
    return 0


def _run(job: TrainingJob, started: float) -> None:
    check_base_model(job.base_model)
    settle_trackers(job.output)
    with folder_alone(job.output):
        if finished(job) is None:
            _train(job, started)


def _train(job: TrainingJob, started: float) -> None:
    choice = choose(job.settings)
    choice.backend.validate(job)
    print(f"backend {choice.backend.name} ({choice.reason})", flush=True)
    if job.settings.compute == "ray":
        from finetune_pipeline.training import ray_cluster

        ray_cluster.train(job, started)
    elif job.settings.workers > 1:
        from finetune_pipeline.training import accelerated

        accelerated.train(job, started)
    else:
        choice.backend.run(job, started)


if __name__ == "__main__":
    sys.exit(main())
