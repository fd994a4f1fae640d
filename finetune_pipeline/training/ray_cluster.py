"""Trains on the workers of a Ray cluster, by Ray Train.

The job's training process stays on this machine: it sends the job, writes the progress that comes back, and puts the
adapter where a local run would. Each worker runs the trainer in a folder on its machine. When workers are
lost, Ray starts them again and they resume from the last checkpoint.

RAY_ADDRESS             the cluster; without it, one is started on this machine for the duration of the run
FINETUNE_RAY_STORAGE    a folder or URI (s3://...) that this machine and all workers reach: base model, dataset,
                        checkpoints and adapter travel through it. Without it the workers must see the same disk under
                        the same paths: one machine, or a shared volume.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.ray_session import check_installed, connected
from finetune_pipeline.training import distributed
from finetune_pipeline.training.job import (
    ADAPTER,
    CHECKPOINTS,
    ENVIRONMENT,
    RESULT,
    JobConfig,
    Progress,
    TrainingError,
    TrainingResult,
    finish,
    finished,
)
from finetune_pipeline.training.memory import RankOutOfMemory
from finetune_pipeline.training.progress import PROGRESS, VALIDATION_LOSS, LineReader, append_progress, read_progress
from finetune_pipeline.training.trackers import TENSORBOARD, set_tensorboard_folder

STORAGE = "FINETUNE_RAY_STORAGE"

_MAX_FAILURES = 3
_POLL_SECONDS = 0.5
_OBJECT_STORE_BYTES = 200_000_000  # of a cluster started here: nothing large goes through it
_RESULT = "result"  # the last checkpoint, which holds the adapter and the result
_INPUTS = Path("inputs")  # in a worker's folder; relative, so that the job's key is the same on every machine


@dataclass(frozen=True)
class WorkerTask:
    """What each worker gets."""

    job: JobConfig  # with paths as workers see them, except for `output`, which each worker makes for itself
    name: str  # of the folder in the storage and of the workers' folders
    inputs: str  # URI of the base model and dataset that were sent; empty if workers see this machine's paths
    hub: tuple[str, str] | None  # id and revision of a Hugging Face model that each machine downloads itself


class ProgressMailbox:
    """An actor that passes progress from rank 0 to the process that started the run."""

    def __init__(self) -> None:
        self._progress: list[Progress] = []

    def put(self, progress: list[Progress]) -> None:
        """Add progress."""
        self._progress += progress

    def take(self) -> list[Progress]:
        """Return the progress since the last call."""
        progress, self._progress = self._progress, []
        return progress


def train(job: JobConfig, started: float) -> None:
    """Train on a Ray cluster; what was started there ends with this process.

    Raises:
        TrainingError: the job is impossible, or the cluster is too small.
        ClusterError: Ray is not installed, or no cluster answers.
    """
    check_installed("training.compute")
    distributed.split_batch(job.settings, job.settings.num_processes)  # raises if it cannot be split
    import ray
    from pyarrow.fs import FileSystem

    storage = os.environ.get(STORAGE, "").rstrip("/")
    if storage and "://" not in storage:
        storage = str(Path(storage).resolve())
    name = f"finetune-{job.key}-{hash_of(str(job.output))[:8]}"
    folder = f"{storage or job.output / 'ray'}/{name}"
    # Ray Train would turn every print() of a worker into a log line, also those by which `datasets` hashes functions.
    defaults = {**ENVIRONMENT, "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    variables = {name: os.environ.get(name, value) for name, value in defaults.items()}
    variables |= {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "MLFLOW_"))}
    if storage and hub_revision(job.base_model) is not None:
        variables["HF_HUB_OFFLINE"] = "0"  # workers download the base model themselves
    with connected(variables, job.settings.num_processes, _OBJECT_STORE_BYTES):
        gpus = use_gpus(ray.cluster_resources(), job.settings.num_processes)
        task = _send(job, name, folder) if storage else WorkerTask(job, name, "", None)
        mailbox = ray.remote(num_cpus=0)(ProgressMailbox).remote()
        fit = ray.remote(num_cpus=0, max_retries=0)(_fit)
        running = fit.remote(task, folder.removesuffix(f"/{name}"), gpus, mailbox)
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([running], timeout=_POLL_SECONDS)
            for progress in ray.get(mailbox.take.remote()):
                append_progress(job.output / PROGRESS, progress)
        refusal, checkpoint = ray.get(running)
        if not refusal:
            _deliver(checkpoint, job, started)
        files, path = FileSystem.from_uri(folder)
        files.delete_dir(path)  # including the inputs that were sent
        if refusal:
            raise TrainingError(refusal)
    shutil.rmtree(job.output / "ray", ignore_errors=True)


def use_gpus(resources: dict[str, float], workers: int) -> bool:
    """Return whether workers train on GPUs, one each: so they do if the cluster has any.

    Raises:
        TrainingError: there are fewer GPUs, or CPU cores, than workers; Ray would wait for them forever.
    """
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    available = int(resources.get(kind, 0))
    if available < workers:
        raise TrainingError(
            f"num_processes is {workers}, but the Ray cluster has {available} {kind}(s) now; set num_processes to "
            f"{max(available, 1)}, or start more nodes first"
        )
    return kind == "GPU"


def _send(job: JobConfig, name: str, folder: str) -> WorkerTask:
    """Upload the job's inputs to the storage; a model of the Hugging Face hub is referred to by its id instead."""
    from pyarrow.fs import FileSystem

    inputs = f"{folder}/{_INPUTS}"
    files, path = FileSystem.from_uri(inputs)
    files.create_dir(path, recursive=True)
    hub = hub_revision(job.base_model)
    if hub is None:
        _upload(job.base_model, f"{inputs}/base/{job.base_model.name}")
    paths = {"base_model": _INPUTS / "base" / job.base_model.name}
    for name_of_input in ("dataset", "preferences", "initial_adapter"):
        source = getattr(job, name_of_input)
        if source is not None:
            _upload(source, f"{inputs}/{name_of_input}")
            paths[name_of_input] = _INPUTS / name_of_input
    return WorkerTask(job.model_copy(update=paths), name, inputs, hub)


def hub_revision(folder: Path) -> tuple[str, str] | None:
    """Return id and revision of a model in Hugging Face's cache (.../models--OWNER--NAME/snapshots/REVISION)."""
    model = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not model.startswith("models--"):
        return None
    return model.removeprefix("models--").replace("--", "/"), folder.name


def _upload(folder: Path, destination: str) -> None:
    from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

    files, path = FileSystem.from_uri(destination)
    files.create_dir(path, recursive=True)
    copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=files)


def _fit(task: WorkerTask, storage: str, gpus: bool, mailbox: Any) -> tuple[str, Any]:
    """Run Ray Train within the cluster, so that it works the same whether this machine is part of it or a client.

    Returns:
        Why the job cannot be trained, or empty; and Ray's checkpoint with the result.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task, "mailbox": mailbox},
        scaling_config=ScalingConfig(num_workers=task.job.settings.num_processes, use_gpu=gpus),
        run_config=RunConfig(
            name=task.name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            # Ray keeps the newest in addition.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=VALIDATION_LOSS, checkpoint_score_order="min"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        ran_out = [failure for failure in error.worker_failures.values() if isinstance(failure, RankOutOfMemory)]
        if not ran_out:
            raise
        return str(ran_out[0]), None
    return result.return_value, result.checkpoint


def _deliver(checkpoint: Any, job: JobConfig, started: float) -> None:
    """Put adapter and result where a run on this machine puts them."""
    with tempfile.TemporaryDirectory(dir=job.output, prefix=".ray-") as folder:
        checkpoint.to_directory(folder)
        result = TrainingResult.model_validate_json((Path(folder) / RESULT).read_bytes())
        shutil.rmtree(job.output / ADAPTER, ignore_errors=True)
        (Path(folder) / ADAPTER).replace(job.output / ADAPTER)
        if (Path(folder) / TENSORBOARD).is_dir():
            shutil.copytree(Path(folder) / TENSORBOARD, job.output / TENSORBOARD, dirs_exist_ok=True)
    finish(job, result.model_copy(update={"job": job.key, "wall_seconds": time.monotonic() - started}))


def _work(config: dict[str, Any]) -> str:
    """Run one worker: fetch the inputs, train as a rank, report checkpoints. Returns a refusal, or empty."""
    import ray.train

    from finetune_pipeline.training.trainer import train_rank

    task: WorkerTask = config["task"]
    machine = Path(tempfile.gettempdir()) / f"{task.name}-{ray.get_runtime_context().get_node_id()[:8]}"
    with _worker_folder(machine) as own:
        os.chdir(machine)
        if task.inputs:
            _fetch(task)
        job = task.job.model_copy(update={"output": own})
        _restore(ray.train.get_checkpoint(), job)
        # A restored result is not reported again: Ray would remove it as the older one of two.
        if finished(job) is None:
            set_tensorboard_folder(own)
            with _forward_progress(own / PROGRESS, config["mailbox"].put.remote):
                refusal = train_rank(job, time.monotonic(), _report)
            if refusal:
                return refusal
            _report(own, _RESULT)
    return ""


@contextmanager
def _worker_folder(machine: Path) -> Iterator[Path]:
    """Make a folder for this worker within its machine's folder; the last worker to leave removes both."""
    import psutil

    own = machine / f"worker-{os.getpid()}"
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        os.chdir(tempfile.gettempdir())
        shutil.rmtree(own, ignore_errors=True)
        others = [int(folder.name.removeprefix("worker-")) for folder in machine.glob("worker-*")]
        if not any(psutil.pid_exists(worker) for worker in others):  # killed workers removed nothing
            shutil.rmtree(machine, ignore_errors=True)


def _fetch(task: WorkerTask) -> None:
    """Download the inputs into the current folder, unless another worker of this machine has."""
    from filelock import FileLock
    from ray.train import Checkpoint

    part = _INPUTS.with_suffix(".part")
    with FileLock(_INPUTS.with_suffix(".lock")):
        if _INPUTS.exists():
            return
        shutil.rmtree(part, ignore_errors=True)  # of a killed worker
        Checkpoint(task.inputs).to_directory(part)
        if task.hub is not None:
            from huggingface_hub import snapshot_download

            name, revision = task.hub
            (part / "base").mkdir()
            (part / "base" / task.job.base_model.name).symlink_to(snapshot_download(name, revision=revision))
        part.rename(_INPUTS)


def _restore(checkpoint: Any, job: JobConfig) -> None:
    """Download the newest checkpoint, and the best one, whose weights the adapter may get in the end."""
    if checkpoint is None:
        return
    name = Path(checkpoint.path).name
    if name == _RESULT:
        checkpoint.to_directory(job.output)
        return
    from pyarrow.fs import FileType

    newest = job.output / CHECKPOINTS / name
    checkpoint.to_directory(newest)
    best = f"checkpoint-{_trainer_state(newest)['best_global_step']}"
    path = f"{checkpoint.path.removesuffix(name)}{best}"
    if best != name and checkpoint.filesystem.get_file_info(path).type == FileType.Directory:
        type(checkpoint)(path, checkpoint.filesystem).to_directory(newest.with_name(best))


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the Trainer's state in a checkpoint; an empty one if another worker wrote it."""
    path = checkpoint / "trainer_state.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"log_history": []}


def _report(folder: Path, name: str = "") -> None:
    """Report this worker's part of a checkpoint to Ray, which stores it; returns when all workers have."""
    import ray.train
    from ray.train import Checkpoint

    history = _trainer_state(folder)["log_history"]
    losses = [entry[VALIDATION_LOSS] for entry in history if VALIDATION_LOSS in entry]
    has_part = folder.is_dir() and (distributed.is_rank_zero() or not name)
    score = {VALIDATION_LOSS: losses[-1] if losses else 0.0}  # equal scores without validation: the newest is kept
    ray.train.report(
        score,
        checkpoint=Checkpoint.from_directory(folder) if has_part else None,
        checkpoint_dir_name=name or folder.name,
    )


@contextmanager
def _forward_progress(progress_file: Path, send: Callable[[list[Progress]], Any]) -> Iterator[None]:
    """Forward what is appended to a progress file while the context lasts."""
    lines, done = LineReader(progress_file), threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            send(list(read_progress(lines)))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        send(list(read_progress(lines)))
