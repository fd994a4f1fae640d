"""The same training on the workers of a Ray cluster, by Ray Train.

The process that was started for the job stays here: it sends the job, writes the progress that comes back as a local
training would, and puts the adapter where a local training would have put it. Each worker runs the trainer itself, in
a folder of its own machine. When workers are lost, Ray starts them again and they go on from the last checkpoint.

RAY_ADDRESS             the cluster; without it, one is started on this machine for the time of the training
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
from finetune_pipeline.training.callbacks import VALIDATION_LOSS
from finetune_pipeline.training.job import (
    ADAPTER,
    CHECKPOINTS,
    RESULT,
    JobConfig,
    Progress,
    TrainingError,
    TrainingResult,
    finish,
    finished,
)
from finetune_pipeline.training.process import ENVIRONMENT
from finetune_pipeline.training.progress import PROGRESS, Follower, append
from finetune_pipeline.training.trackers import TENSORBOARD, settle_trackers, tracker_variables

STORAGE = "FINETUNE_RAY_STORAGE"

_LOSSES_SURVIVED = 3
_POLL_SECONDS = 0.5
_OBJECT_STORE_BYTES = 200_000_000  # of a cluster started here: nothing large goes through it
_RESULT = "result"  # the last checkpoint, which holds the adapter and what the training says of itself
_INPUTS = Path("inputs")  # in a worker's folder; relative, so that the job's key is the same on every machine

# Ray Train would turn every print() of a worker into a log line, also those by which `datasets` hashes functions.
_RAY_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


@dataclass(frozen=True)
class Order:
    """What each worker is told.

    Attributes:
        job: the job with paths as the workers see them, but for `output`, which each makes for itself.
        name: of the folder in the storage, and of the workers' folders.
        inputs: URI of the base model and dataset that were sent; empty when the workers see this machine's paths.
        hub: Hugging Face id and revision of a base model that each machine gets by itself.
    """

    job: JobConfig
    name: str
    inputs: str
    hub: tuple[str, str] | None


class Mailbox:
    """An actor between the first worker, which tells how far it is, and the process that started the training."""

    def __init__(self) -> None:
        self._lines: list[Progress] = []

    def put(self, lines: list[Progress]) -> None:
        """Add lines of progress."""
        self._lines += lines

    def take(self) -> list[Progress]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def train(job: JobConfig, started: float) -> None:
    """Train on a Ray cluster; what was started there ends with this process.

    Args:
        job: what to train.
        started: time.monotonic() at which this process began.

    Raises:
        TrainingError: the job is impossible, or the cluster has too little.
        ClusterError: Ray is not installed, or no cluster answers.
    """
    check_installed("training.compute")
    distributed.split_batch(job.settings, job.settings.num_processes)
    import ray

    storage = _storage()
    name = f"finetune-{job.key}-{hash_of(str(job.output))[:8]}"
    place = f"{storage or job.output / 'ray'}/{name}"
    online = bool(storage) and hub_revision(job.base_model) is not None
    variables = {name: os.environ.get(name, value) for name, value in (ENVIRONMENT | _RAY_ENVIRONMENT).items()}
    variables |= tracker_variables()
    if online:
        variables["HF_HUB_OFFLINE"] = "0"  # workers get the base model by themselves
    with connected(variables, job.settings.num_processes, _OBJECT_STORE_BYTES):
        gpus = _has_gpus(ray.cluster_resources(), job.settings.num_processes)
        order = _send(job, name, place) if storage else Order(job, name, "", None)
        refusal, checkpoint = _follow(order, place.removesuffix(f"/{name}"), gpus, job.output / PROGRESS)
        if not refusal:
            _deliver(checkpoint, job, started)
        _remove(place)  # what was sent there too
        if refusal:
            raise TrainingError(refusal)
    shutil.rmtree(job.output / "ray", ignore_errors=True)


def _storage() -> str:
    """The place that all machines reach, as an absolute path or URI; empty if none is set."""
    storage = os.environ.get(STORAGE, "").rstrip("/")
    return storage if not storage or "://" in storage else str(Path(storage).resolve())


def _has_gpus(resources: dict[str, float], workers: int) -> bool:
    """Whether the workers train on GPUs: each has one, if the cluster has any.

    Raises:
        TrainingError: there are fewer GPUs, or processor cores, than workers; Ray would wait for them for ever.
    """
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    there = int(resources.get(kind, 0))
    if there < workers:
        raise TrainingError(
            f"num_processes is {workers}, but the Ray cluster has {there} {kind}(s) now; set "
            f"num_processes to {max(there, 1)}, or start more nodes first"
        )
    return kind == "GPU"


def _send(job: JobConfig, name: str, place: str) -> Order:
    """Bring the job's inputs to the storage; a model of the Hugging Face hub is told by its id instead."""
    from pyarrow.fs import FileSystem

    inputs = f"{place}/{_INPUTS}"
    files, path = FileSystem.from_uri(inputs)
    files.create_dir(path, recursive=True)
    hub = hub_revision(job.base_model)
    if hub is None:
        _upload(job.base_model, f"{inputs}/base/{job.base_model.name}")
    seen = {"base_model": _INPUTS / "base" / job.base_model.name}
    for part in ("dataset", "preferences", "initial_adapter"):
        folder = getattr(job, part)
        if folder is not None:
            _upload(folder, f"{inputs}/{part}")
            seen[part] = _INPUTS / part
    return Order(job.model_copy(update=seen), name, inputs, hub)


def hub_revision(folder: Path) -> tuple[str, str] | None:
    """Id and revision of a model that lies in Hugging Face's cache (.../models--OWNER--NAME/snapshots/REVISION)."""
    model = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not model.startswith("models--"):
        return None
    return model.removeprefix("models--").replace("--", "/"), folder.name


def _upload(folder: Path, destination: str) -> None:
    from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

    files, path = FileSystem.from_uri(destination)
    files.create_dir(path, recursive=True)
    copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=files)


def _remove(place: str) -> None:
    from pyarrow.fs import FileSystem

    files, path = FileSystem.from_uri(place)
    files.delete_dir(path)


def _follow(order: Order, storage: str, gpus: bool, progress: Path) -> tuple[str, Any]:
    """Run the training in the cluster and write its progress here.

    Returns:
        Why it cannot be done, or empty; and Ray's checkpoint with the result.
    """
    import ray

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    running = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(order, storage, gpus, mailbox)
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([running], timeout=_POLL_SECONDS)
        for line in ray.get(mailbox.take.remote()):
            append(progress, line)
    refusal, checkpoint = ray.get(running)
    return refusal, checkpoint


def _fit(order: Order, storage: str, gpus: bool, mailbox: Any) -> tuple[str, Any]:
    """Run Ray Train, in the cluster itself: so it does whether this machine is part of it or a client."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"order": order, "mailbox": mailbox},
        scaling_config=ScalingConfig(num_workers=order.job.settings.num_processes, use_gpu=gpus),
        run_config=RunConfig(
            name=order.name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=_LOSSES_SURVIVED),
            # The newest is kept besides.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=VALIDATION_LOSS, checkpoint_score_order="min"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        ran_out = [
            failure for failure in error.worker_failures.values() if isinstance(failure, distributed.MemoryRanOutHere)
        ]
        if not ran_out:
            raise
        return str(ran_out[0]), None
    return result.return_value, result.checkpoint


def _deliver(checkpoint: Any, job: JobConfig, started: float) -> None:
    """Put adapter and result where a training on this machine puts them."""
    with tempfile.TemporaryDirectory(dir=job.output, prefix=".ray-") as folder:
        checkpoint.to_directory(folder)
        result = TrainingResult.model_validate_json((Path(folder) / RESULT).read_bytes())
        shutil.rmtree(job.output / ADAPTER, ignore_errors=True)
        (Path(folder) / ADAPTER).replace(job.output / ADAPTER)
        if (Path(folder) / TENSORBOARD).is_dir():
            shutil.copytree(Path(folder) / TENSORBOARD, job.output / TENSORBOARD, dirs_exist_ok=True)
    finish(job, result.model_copy(update={"job": job.key, "wall_seconds": time.monotonic() - started}))


def _work(config: dict[str, Any]) -> str:
    """A worker: fetch what it needs, train its part, keep checkpoints in the storage. Returns a refusal, or empty."""
    import ray.train

    order: Order = config["order"]
    machine = Path(tempfile.gettempdir()) / f"{order.name}-{ray.get_runtime_context().get_node_id()[:8]}"
    with _own_folder(machine) as own:
        os.chdir(machine)
        if order.inputs:
            _fetch(order)
        job = order.job.model_copy(update={"output": own})
        _restore(ray.train.get_checkpoint(), job)
        if (
            finished(job) is None
        ):  # else it is the result that was restored; kept again, Ray would remove it as the older
            settle_trackers(own)
            distributed.keep_checkpoints(_keep)
            with _told(own / PROGRESS, config["mailbox"].put.remote):
                refusal = distributed.take_part(job, time.monotonic())
            if refusal:
                return refusal
            _keep(own, _RESULT)
    return ""


@contextmanager
def _own_folder(machine: Path) -> Iterator[Path]:
    """A folder of this worker within its machine's; the last worker to leave removes all."""
    import psutil

    own = machine / f"worker-{os.getpid()}"
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        os.chdir(tempfile.gettempdir())
        shutil.rmtree(own, ignore_errors=True)
        others = [int(folder.name.removeprefix("worker-")) for folder in machine.glob("worker-*")]
        if not any(psutil.pid_exists(worker) for worker in others):  # killed ones removed nothing
            shutil.rmtree(machine, ignore_errors=True)


def _fetch(order: Order) -> None:
    """Bring the inputs to this machine, into the present folder, unless another worker here has."""
    from filelock import FileLock
    from ray.train import Checkpoint

    part = _INPUTS.with_suffix(".part")
    with FileLock(_INPUTS.with_suffix(".lock")):
        if _INPUTS.exists():
            return
        shutil.rmtree(part, ignore_errors=True)  # of a worker that was killed
        Checkpoint(order.inputs).to_directory(part)
        if order.hub is not None:
            from huggingface_hub import snapshot_download

            name, revision = order.hub
            (part / "base").mkdir()
            (part / "base" / order.job.base_model.name).symlink_to(snapshot_download(name, revision=revision))
        part.rename(_INPUTS)


def _restore(checkpoint: Any, job: JobConfig) -> None:
    """Bring the newest checkpoint here, and the best one, whose weights the adapter may have in the end."""
    if checkpoint is None:
        return
    name = Path(checkpoint.path).name
    if name == _RESULT:
        checkpoint.to_directory(job.output)
        return
    from pyarrow.fs import FileType

    newest = job.output / CHECKPOINTS / name
    checkpoint.to_directory(newest)
    best = f"checkpoint-{_state(newest)['best_global_step']}"
    place = f"{checkpoint.path.removesuffix(name)}{best}"
    if best != name and checkpoint.filesystem.get_file_info(place).type == FileType.Directory:
        type(checkpoint)(place, checkpoint.filesystem).to_directory(newest.with_name(best))


def _state(checkpoint: Path) -> dict[str, Any]:
    """What the Trainer remembers in a checkpoint; nothing where another worker wrote it."""
    path = checkpoint / "trainer_state.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"log_history": []}


def _keep(folder: Path, name: str = "") -> None:
    """Bring this worker's part of a checkpoint to the storage; returns when all workers have."""
    import ray.train
    from ray.train import Checkpoint

    losses = [entry[VALIDATION_LOSS] for entry in _state(folder)["log_history"] if VALIDATION_LOSS in entry]
    checkpoint = Checkpoint.from_directory(folder) if folder.is_dir() and (distributed.is_first() or not name) else None
    score = {VALIDATION_LOSS: losses[-1] if losses else 0.0}  # alike, where nothing is validated: the newest is kept
    ray.train.report(score, checkpoint=checkpoint, checkpoint_dir_name=name or folder.name)


@contextmanager
def _told(progress: Path, tell: Callable[[list[Progress]], Any]) -> Iterator[None]:
    """Pass on what is added to a progress file, while the context lasts."""
    follower, done = Follower(progress), threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            tell(list(follower.read()))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tell(list(follower.read()))
