"""The memory check before training, and the errors when memory runs out anyway."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import read_architecture
from finetune_pipeline.training.estimate import ERROR, GIB, Device, estimate_memory
from finetune_pipeline.training.hardware import available_memory
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.presets import (
    CHANGEABLE,
    Machine,
    first_fitting,
    next_micro_batch,
    smallest_micro_batch,
)
from finetune_pipeline.wording import error_line

# torch's allocators, C++'s, and oneDNN's, which says no more than this when it gets no memory.
_ALLOCATOR_ERRORS = (
    "CUDA out of memory",
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "could not create a primitive",
    "Cannot allocate memory",
)


def check_memory(base_model: Path, settings: TrainingSettings, *, longest: int, bf16: bool, shards: int = 1) -> None:
    """Compare the estimated memory of a run with what is free, and log both.

    Args:
        settings: of one rank.
        longest: tokens of the longest example.
        shards: GPUs across which the base weights are sharded.

    Raises:
        TrainingError: it needs more than is free, by more than the error of the estimate.
    """
    import torch

    try:
        architecture = read_architecture(base_model / "config.json", base_model.name)
    except TrainingError as unknown:
        print(f"memory is not checked: {unknown}", file=sys.stderr, flush=True)
        return
    device: Device = "gpu" if torch.cuda.is_available() else "cpu"
    need = estimate_memory(architecture, settings, device, bf16=bf16, tokens=longest, shards=shards)
    available = available_memory()
    fits = need.to_come * (1 - ERROR) <= available
    parts = ", ".join(f"{part.name} {part.bytes / GIB:.2f}" for part in need.parts[1:])
    found = f"estimated memory of the training run: {need.to_come / GIB:.2f} GiB more ({parts})"
    found += f"; free: {available / GIB:.2f} GiB"
    if fits and available < need.to_come:
        found += f"; the estimate may be off by {ERROR:.0%}, so training starts"
    print(found, file=sys.stderr, flush=True)
    if fits:
        return
    # The process or CUDA context exists already, so its bytes are not part of what is available.
    machine = Machine(device, available + need.parts[0].bytes, bf16, rate=1.0, source="", shards=shards)
    smaller = first_fitting(architecture, settings, CHANGEABLE, machine, longest)
    remedy = "nothing smaller fits either: free some memory, or use a smaller base_model"
    if smaller is not None:
        names = [name for name in TrainingSettings.model_fields if name in CHANGEABLE]
        changes = {name: getattr(smaller, name) for name in names if getattr(smaller, name) != getattr(settings, name)}
        if "gradient_accumulation_steps" in changes:  # of all ranks, as in the settings of the whole run
            changes["gradient_accumulation_steps"] *= settings.num_processes
        remedy = "what fits: " + ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
    raise TrainingError(f"{found}; {remedy}")


class MemoryRanOut(TrainingError):
    """Memory ran out; a fresh process should continue with a micro-batch of `micro_batch`."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch


class RankOutOfMemory(Exception):
    """Memory ran out on one of several ranks. The rank has to end by this, since the others wait for it."""


def with_micro_batch(settings: TrainingSettings, micro_batch: int, examples: int) -> TrainingSettings:
    """Return settings that run `examples` per update in micro-batches of `micro_batch`.

    They are for running a job; its key is that of the settings as they were given.
    """
    running = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": examples // micro_batch}
    return settings.model_copy(update=running)


@contextmanager
def catch_out_of_memory(settings: TrainingSettings) -> Iterator[None]:
    """Turn out-of-memory errors of a run in one process into what to do next.

    Raises:
        MemoryRanOut: a fresh process should resume with a smaller micro-batch. This process cannot: it does not get
            back all memory that the failed step held.
        TrainingError: memory ran out with the smallest micro-batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message, micro_batch = error_line(error), settings.per_device_train_batch_size
        examples = micro_batch * settings.gradient_accumulation_steps
        smaller = next_micro_batch(micro_batch, examples, smallest_micro_batch(settings))
        if not smaller:
            raise TrainingError(_smallest_ran_out(settings, micro_batch, message)) from error
        raise MemoryRanOut(
            f"memory ran out with a micro-batch of {micro_batch} ({message}); resuming from the last checkpoint with "
            f"{smaller} and {examples // smaller} gradient accumulation steps, the same {examples} examples per update",
            smaller,
        ) from error


def out_of_memory_advice(settings: TrainingSettings, micro_batch: int, message: str) -> str:
    """Return the error message where a run cannot reduce its micro-batch itself: several ranks, or Axolotl.

    `settings` are those of the whole run, `micro_batch` is that of one device.
    """
    examples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    smaller = next_micro_batch(micro_batch, examples // settings.num_processes, smallest_micro_batch(settings))
    if not smaller:
        return _smallest_ran_out(settings, micro_batch, message)
    return (
        f"memory ran out with a micro-batch of {micro_batch} ({message}); set per_device_train_batch_size: {smaller} "
        f"and gradient_accumulation_steps: {examples // smaller}, which gives the same {examples} examples per update; "
        "unchanged, it would resume from the last checkpoint and run out of memory again"
    )


def _smallest_ran_out(settings: TrainingSettings, micro_batch: int, message: str) -> str:
    remedies = [f"max_length below {settings.max_length}"]
    if not settings.gradient_checkpointing:
        remedies.insert(0, "gradient_checkpointing: true")
    if settings.adapter == "lora":
        remedies.insert(-1, "adapter: qlora")
    least = f", the least that {settings.method} needs" if micro_batch > 1 else ""
    return (
        f"memory ran out with a micro-batch of {micro_batch}{least} ({message}); set {', or '.join(remedies)}, or use "
        "a smaller base_model; `finetune train plan` shows what fits"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: Python's, CUDA's, or that of torch's allocator on a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_out_of_memory_message(str(error))


def is_out_of_memory_message(text: str) -> bool:
    """Return whether the message of an allocator, or of a child process, means that memory ran out."""
    return any(message in text for message in _ALLOCATOR_ERRORS)
