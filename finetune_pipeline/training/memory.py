"""Memory: asked for before a training begins, and what happens when it runs out all the same."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import read_architecture
from finetune_pipeline.training.estimate import ERROR, GIB, Device, MemoryEstimate, memory
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.presets import CHANGEABLE, Machine, changes, fewest, first_fitting, halved

# torch's own, C++'s, and oneDNN's, which says no more than this when it gets no memory (seen under a limit).
_ALLOCATORS = (
    "CUDA out of memory",
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "could not create a primitive",
    "Cannot allocate memory",
)

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


def check_memory(base_model: Path, settings: TrainingSettings, *, longest: int, bf16: bool, shards: int = 1) -> None:
    """Compare what a training is reckoned to need with what there is; tell it in the log.

    Args:
        base_model: its folder.
        settings: of the training, with the share of one process of its team.
        longest: tokens of the longest example.
        bfloat16: whether it trains with bfloat16.
        shards: cards that the base's weights are dealt out to.

    Raises:
        TrainingError: it needs clearly more than there is: by more than the estimate's own error.
    """
    import torch

    try:
        architecture = read_architecture(base_model / "config.json", base_model.name)
    except TrainingError as unknown:
        print(f"memory is not checked: {unknown}", file=sys.stderr, flush=True)
        return
    device: Device = "gpu" if torch.cuda.is_available() else "cpu"
    need = memory(architecture, settings, device, bf16=bf16, tokens=longest, shards=shards)
    available = available_bytes()
    print(comparison(need, available), file=sys.stderr, flush=True)
    if need.to_come * (1 - ERROR) > available:
        # The process or context stands already, so its bytes are there beside what is available.
        machine = Machine(device, available + need.parts[0].bytes, bf16, rate=1.0, source="", shards=shards)
        smaller = first_fitting(architecture, settings, CHANGEABLE, machine, longest)
        raise TrainingError(f"{comparison(need, available)}; {_remedy(settings, smaller)}")


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
    whole = [_of_the_team(one) for one in (settings, smaller)]
    return "what fits: " + ", ".join(f"{name}: {str(value).lower()}" for name, value in changes(*whole).items())


def _of_the_team(share: TrainingSettings) -> TrainingSettings:
    """One process's share of an update as the settings say it, for all of them."""
    return share.model_copy(
        update={"gradient_accumulation_steps": share.gradient_accumulation_steps * share.num_processes}
    )


class MemoryRanOut(TrainingError):
    """Memory ran out, and `micro_batch` examples at a time are to be tried next, in a process of their own."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch


def with_micro_batch(settings: TrainingSettings, micro_batch: int, examples: int) -> TrainingSettings:
    """Return settings that run `examples` per update in micro-batches of `micro_batch`.

    They are for running a job; its key is that of the settings as they were given.
    """
    running = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": examples // micro_batch}
    return settings.model_copy(update=running)


@contextmanager
def memory_may_run_out(settings: TrainingSettings) -> Iterator[None]:
    """Tell want of memory from other errors.

    Raises:
        MemoryRanOut: memory ran out; a new process is to go on from the last checkpoint with a smaller micro-batch.
            This one was tried and did not: what a failed step held was not given back.
        TrainingError: memory ran out with as few examples at a time as there can be.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or ["MemoryError"])[0]
        examples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        raise _less(settings, settings.per_device_train_batch_size, examples, said) from error


def _less(settings: TrainingSettings, micro: int, examples: int, said: str) -> TrainingError:
    smaller = halved(micro, examples, fewest(settings))
    if not smaller:
        return TrainingError(_with_the_fewest(settings, micro, said))
    message = (
        f"memory ran out with micro-batch {micro} ({said}); going on from the last checkpoint with {smaller} examples "
        f"at a time and {examples // smaller} steps an update, which makes the same {examples} examples an update"
    )
    return MemoryRanOut(message, smaller)


def _with_the_fewest(settings: TrainingSettings, micro: int, said: str) -> str:
    remedies = [f"max_length below {settings.max_length}"]
    if not settings.gradient_checkpointing:
        remedies.insert(0, "gradient_checkpointing: true")
    if settings.adapter == "lora":
        remedies.insert(-1, "adapter: qlora")
    tried = "one example at a time" if micro == 1 else f"{micro} examples at a time, and {settings.method} needs 2"
    return (
        f"memory ran out with {tried} ({said}); set {', or '.join(remedies)}, or take a smaller "
        "base_model; `finetune train plan` shows what fits"
    )


def ran_out(settings: TrainingSettings, micro_batch: int, said: str) -> str:
    """What to do where a training cannot go on by itself with fewer examples at a time: in a team, or by Axolotl.

    Args:
        settings: of the whole training.
        micro_batch: examples that one device had at once.
        said: the error that told it.
    """
    examples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    smaller = halved(micro_batch, examples // settings.num_processes, fewest(settings))
    if not smaller:
        return _with_the_fewest(settings, micro_batch, said)
    return (
        f"memory ran out with a micro-batch of {micro_batch} ({said}); set per_device_train_batch_size: {smaller} and "
        f"gradient_accumulation_steps: {examples // smaller}, which gives the same {examples} examples per update; "
        "unchanged, it would resume from the last checkpoint and run out of memory again"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or the one of torch's allocator on a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or tells_of_want_of_memory(str(error))


def tells_of_want_of_memory(words: str) -> bool:
    """Whether what an allocator, or a child process, said means that memory ran out."""
    return any(said in words for said in _ALLOCATORS)
