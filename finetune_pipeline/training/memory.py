"""Memory: asked for before a training begins, and what happens when it runs out all the same."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import read_architecture
from finetune_pipeline.training.estimate import ERROR, GIB, Device, MemoryEstimate, memory
from finetune_pipeline.training.job import TrainingError, TrainingJob
from finetune_pipeline.training.presets import CHANGEABLE, Machine, changes, first_fitting, halved

T = TypeVar("T")

# torch's own, C++'s, and oneDNN's, which says no more than this when it gets no memory (seen under a limit).
_CPU_ALLOCATORS = ("DefaultCPUAllocator", "std::bad_alloc", "could not create a primitive", "Cannot allocate memory")

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Memory that this process could still take: of the GPU where there is one, else of the machine and container."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return available_main_memory()


def available_main_memory() -> int:
    """Main memory that could still be taken, in bytes; in a container with a limit, what its limit leaves."""
    import psutil

    left = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
        # Pages of files count as used there, though they are given back when memory is wanted.
        left = min(left, max(room, 0) + _cached_bytes(Path(limit).parent / "memory.stat"))
    return left


def _cached_bytes(stat: Path) -> int:
    try:
        counts = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))


def check_memory(job: TrainingJob, *, longest: int, bfloat16: bool) -> None:
    """Compare what a training is reckoned to need with what there is; tell it in the log.

    Args:
        job: what is to be trained.
        longest: tokens of the longest example.
        bfloat16: whether it trains with bfloat16.

    Raises:
        TrainingError: it needs clearly more than there is: by more than the estimate's own error.
    """
    import torch

    try:
        architecture = read_architecture(job.base_model / "config.json", job.base_model.name)
    except TrainingError as unknown:
        print(f"memory is not checked: {unknown}", file=sys.stderr, flush=True)
        return
    device: Device = "gpu" if torch.cuda.is_available() else "cpu"
    need = memory(architecture, job.settings, device, bfloat16=bfloat16, tokens=longest)
    available = available_bytes()
    print(comparison(need, available), file=sys.stderr, flush=True)
    if need.to_come * (1 - ERROR) > available:
        # The process or context stands already, so its bytes are there beside what is available.
        machine = Machine(device, available + need.parts[0].bytes, bfloat16, rate=1.0, source="")
        smaller = first_fitting(architecture, job.settings, CHANGEABLE, machine, longest)
        raise TrainingError(f"{comparison(need, available)}; {_remedy(job.settings, smaller)}")


def comparison(need: MemoryEstimate, available: int) -> str:
    """What a training is reckoned to need beside what there is, in words."""
    parts = ", ".join(f"{part.name} {part.bytes / GIB:.2f}" for part in need.parts[1:])
    words = f"the training is reckoned to need {need.to_come / GIB:.2f} GiB more ({parts})"
    words += f" and {available / GIB:.2f} GiB are free"
    if need.to_come * (1 - ERROR) <= available < need.to_come:
        words += f"; the estimate may be off by {ERROR:.0%}, so it is tried"
    return words


def _remedy(settings: TrainingSettings, smaller: TrainingSettings | None) -> str:
    if smaller is None:
        return "nothing smaller fits either: free some memory, or take a smaller base_model"
    return "what fits: " + ", ".join(
        f"{name}: {str(value).lower()}" for name, value in changes(settings, smaller).items()
    )


def with_less_memory(settings: TrainingSettings, attempt: Callable[[TrainingSettings], T]) -> tuple[T, int]:
    """Make an attempt, and again with half the micro-batch as long as memory runs out.

    The examples of an update stay the same: their gradients are summed over more steps. An attempt is to go on from
    the last whole checkpoint; the settings that it is given are for the running of it and leave the job's key alone.

    Args:
        settings: of the training.
        attempt: trains with the settings that it is given, and raises what the memory's owner raises.

    Returns:
        What the attempt returned, and the micro-batch with which it succeeded.

    Raises:
        TrainingError: memory ran out with one example at a time.
    """
    examples = settings.batch_size * settings.gradient_accumulation
    micro = settings.batch_size
    while True:
        try:
            running = {"batch_size": micro, "gradient_accumulation": examples // micro}
            return attempt(settings.model_copy(update=running)), micro
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            said = str(error).strip().splitlines()[:1]
        # Only here, outside the handler, is the attempt's last frame gone, and with it its tensors.
        micro = _less(settings, micro, examples, said[0] if said else "MemoryError")
        free_memory()


def _less(settings: TrainingSettings, micro: int, examples: int, said: str) -> int:
    smaller = halved(micro, examples)
    if not smaller:
        remedies = [f"max_length below {settings.max_length}"]
        if not settings.gradient_checkpointing:
            remedies.insert(0, "gradient_checkpointing: true")
        if settings.adapter == "lora":
            remedies.insert(-1, "adapter: qlora")
        raise TrainingError(
            f"memory ran out with one example at a time ({said}); set {', or '.join(remedies)}, or take a smaller "
            "base_model; `finetune train plan` shows what fits"
        )
    print(
        f"memory ran out with micro-batch {micro} ({said}); going on from the last checkpoint with {smaller} examples "
        f"at a time and {examples // smaller} steps an update, which makes the same {examples} examples an update",
        file=sys.stderr,
        flush=True,
    )
    return smaller


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or the one of torch's allocator on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _CPU_ALLOCATORS)


def free_memory() -> None:
    """Give back what nobody refers to any more."""
    import torch

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's heap keeps what was freed
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
