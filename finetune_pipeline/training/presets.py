"""Presets: settings for a memory size and a base model, found by the memory estimate. Pure functions, no torch.

A preset has a memory size and preferred settings (rank, length, examples per update). What fits is searched in a fixed
order, which `finetune train plan` and the suggestion of a refused run use too. In this order, each step is tried
before the next one:

1. a smaller micro-batch with more gradient accumulation, which changes nothing but speed
2. gradient checkpointing, which costs time
3. if the accumulation steps are set, fewer examples per update
4. QLoRA, which costs some accuracy of the base weights
5. shorter examples, which leaves out examples
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import product
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.estimate import GIB, Device, estimate_memory
from finetune_pipeline.training.job import TrainingError

USABLE = 0.95
"""Fraction of a GPU's or machine's memory that a plan uses; display and driver need the rest."""
EXAMPLES_PER_UPDATE = 16
SHORTEST = 256
"""Smallest max_length of a plan, in tokens."""
CHANGEABLE = frozenset(
    {"per_device_train_batch_size", "gradient_accumulation_steps", "adapter", "gradient_checkpointing", "max_length"}
)
"""Settings that a plan may change so that a run fits."""


@dataclass(frozen=True)
class Machine:
    """A machine to train on."""

    device: Device
    bytes: float  # memory that training may use
    bf16: bool  # whether it can train in bfloat16
    rate: float  # floating-point operations per second that training reaches; on a CPU in float32
    source: str  # where the rate comes from, in words
    shards: int = 1  # number of such machines across which the base weights are sharded


@dataclass(frozen=True)
class Preset:
    """A memory size and the preferred settings for it."""

    gib: int  # memory of the GPU, or of a machine without one
    lora_r: int
    max_length: int
    gpu: tuple[str, float]  # one of that size and its published peak rate (dense bfloat16 with float32 accumulation)

    @property
    def preferred(self) -> dict[str, Any]:
        """The settings with which the search starts."""
        return {
            "adapter": "lora",
            "lora_r": self.lora_r,
            "lora_alpha": 2 * self.lora_r,
            "max_length": self.max_length,
            "per_device_train_batch_size": EXAMPLES_PER_UPDATE,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        }


ASSUMED_UTILIZATION = 0.35
"""Fraction of a GPU's published peak that fine-tuning is assumed to reach. Not measured."""
CPU_BF16_GAIN = 1.5
"""How much faster training is in bfloat16 on a CPU that has it; 1.3 to 2.2 were measured, by batch size."""
SMALL_BATCH = 8
"""Fewer examples at once gain nothing from bfloat16 autocast on a CPU; 8 are 1.3 times as fast, 24 2.2 times."""
CPU_RATE = 100e9
"""Operations per second of training on two cores in float32; `finetune train plan` measures its own machine."""

PRESETS: dict[str, Preset] = {
    "cpu": Preset(16, 16, 512, ("two CPU cores", CPU_RATE / ASSUMED_UTILIZATION)),
    "8gb": Preset(8, 16, 1024, ("an RTX 4060", 60e12)),
    "12gb": Preset(12, 16, 1024, ("an RTX 3060", 51e12)),
    "16gb": Preset(16, 16, 2048, ("an RTX 4060 Ti", 88e12)),
    "24gb": Preset(24, 16, 2048, ("an RTX 3090", 71e12)),
    "48gb": Preset(48, 32, 4096, ("an RTX A6000", 155e12)),
    "80gb": Preset(80, 32, 4096, ("an A100", 312e12)),
}


def machine_of(preset: str) -> Machine:
    """Return the machine that a preset is for."""
    found = PRESETS[preset]
    name, peak = found.gpu
    usable = found.gib * GIB * USABLE
    if preset == "cpu":
        return Machine("cpu", usable, False, CPU_RATE, f"{name}, assumed, not measured here")
    source = f"{ASSUMED_UTILIZATION:.0%} of the published peak of {name} ({peak / 1e12:.3g}), assumed, not measured"
    return Machine("gpu", usable, True, ASSUMED_UTILIZATION * peak, source)


def uses_bf16(settings: TrainingSettings, machine: Machine) -> bool:
    """Return whether a run on a machine computes in bfloat16."""
    large = machine.device == "gpu" or settings.per_device_train_batch_size >= SMALL_BATCH
    return machine.bf16 and settings.bf16 and large


def rate_of(settings: TrainingSettings, machine: Machine) -> tuple[float, str]:
    """Return the operations per second that a run reaches on a machine, and where that number comes from."""
    if machine.device == "gpu" or not uses_bf16(settings, machine):
        return machine.rate, machine.source
    return CPU_BF16_GAIN * machine.rate, f"{CPU_BF16_GAIN:g} times, for bfloat16, {machine.source}"


def nearest_preset(gib: float) -> str:
    """Return the largest preset for a GPU of at most this much memory, or the smallest preset."""
    gpus = [name for name, preset in PRESETS.items() if name != "cpu" and preset.gib <= gib * 1.02]
    return max(gpus, key=lambda name: PRESETS[name].gib, default="8gb")


def apply_preset(settings: TrainingSettings, architecture: Architecture) -> TrainingSettings:
    """Return settings with unset ones filled from their preset; without a preset, unchanged.

    Raises:
        TrainingError: the model does not fit into the preset's memory; the message says what it needs.
    """
    if settings.preset is None:
        return settings
    machine = machine_of(settings.preset)
    preferred = with_preferred(settings, PRESETS[settings.preset])
    free = CHANGEABLE - settings.model_fields_set
    found = first_fitting(architecture, preferred, free, machine)
    if found is None:
        raise TrainingError(does_not_fit(architecture, preferred, free, machine, f"preset {settings.preset}"))
    return found


def with_preferred(settings: TrainingSettings, preset: Preset) -> TrainingSettings:
    """Return settings with unset ones filled with the preset's preferred ones, whether or not they fit."""
    filled = {name: value for name, value in preset.preferred.items() if name not in settings.model_fields_set}
    if "per_device_train_batch_size" not in filled and "gradient_accumulation_steps" in filled:
        steps = EXAMPLES_PER_UPDATE // settings.per_device_train_batch_size
        filled["gradient_accumulation_steps"] = max(1, steps)
    if "per_device_train_batch_size" in filled and "gradient_accumulation_steps" not in filled:
        batch = EXAMPLES_PER_UPDATE // settings.gradient_accumulation_steps
        filled["per_device_train_batch_size"] = max(smallest_micro_batch(settings), batch)
    return settings.model_copy(update=filled)


def first_fitting(
    architecture: Architecture, settings: TrainingSettings, free: Set[str], machine: Machine, tokens: int | None = None
) -> TrainingSettings | None:
    """Return the first settings in the order of the search that fit into a machine's memory, or None.

    Args:
        settings: where the search starts.
        free: names of the settings that may change.
        tokens: of the longest example; default max_length.
    """
    return next((one for one in smaller_settings(settings, free) if fits(architecture, one, machine, tokens)), None)


def fits(architecture: Architecture, settings: TrainingSettings, machine: Machine, tokens: int | None = None) -> bool:
    """Return whether the estimated memory of a run is within a machine's memory."""
    need = estimate_memory(
        architecture, settings, machine.device, bf16=uses_bf16(settings, machine), tokens=tokens, shards=machine.shards
    )
    return need.bytes <= machine.bytes


def smaller_settings(settings: TrainingSettings, free: Set[str]) -> Iterator[TrainingSettings]:
    """Yield settings that need less and less memory, changing only those that are free."""
    batch_is_free = "per_device_train_batch_size" in free
    steps_are_free = "gradient_accumulation_steps" in free
    least = smallest_micro_batch(settings)
    lengths = [settings.max_length]
    while "max_length" in free and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    adapters = ["lora", "qlora"] if settings.adapter == "lora" and "adapter" in free else [settings.adapter]
    checkpointing = [settings.gradient_checkpointing]
    if not settings.gradient_checkpointing and "gradient_checkpointing" in free:
        checkpointing = [False, True]
    batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    # With fixed accumulation steps only a smaller batch helps, which makes updates of fewer examples.
    updates = _micro_batches(batch, batch, least) if batch_is_free and not steps_are_free else [batch]
    for length, adapter, update, recompute in product(lengths, adapters, updates, checkpointing):
        examples = update * steps
        for micro_batch in _micro_batches(update, examples, least) if batch_is_free and steps_are_free else [update]:
            changes = {
                "max_length": length,
                "adapter": adapter,
                "gradient_checkpointing": recompute,
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": examples // micro_batch,
            }
            yield settings.model_copy(update=changes)


def _micro_batches(largest: int, examples: int, least: int) -> list[int]:
    """Return smaller and smaller micro-batches of which whole ones make `examples`."""
    sizes = []
    while largest:
        sizes.append(largest)
        largest = next_micro_batch(largest, examples, least)
    return sizes


def smallest_micro_batch(settings: TrainingSettings) -> int:
    """Return the fewest examples that a device needs at once: KTO compares each with another one."""
    return 2 if settings.method == "kto" else 1


def next_micro_batch(micro_batch: int, examples: int, least: int) -> int:
    """Return the next smaller micro-batch: at most half, and a divisor of `examples`; 0 below `least`.

    >>> [next_micro_batch(*one) for one in [(24, 24, 1), (6, 6, 1), (5, 5, 1), (1, 16, 1), (2, 16, 2)]]
    [12, 3, 1, 0, 0]
    """
    return next((size for size in range(micro_batch // 2, least - 1, -1) if examples % size == 0), 0)


def does_not_fit(
    architecture: Architecture, preferred: TrainingSettings, free: Set[str], machine: Machine, where: str
) -> str:
    """Return the error message for a plan in which nothing fits into `where`: what the least needs, and what to do."""
    *_, least = smaller_settings(preferred, free)
    need = estimate_memory(architecture, least, machine.device, bf16=uses_bf16(least, machine)).bytes
    larger = [name for name, preset in PRESETS.items() if name != "cpu" and preset.gib * GIB * USABLE >= need]
    remedy = f"the smallest preset for it is {larger[0]}" if larger else "no preset is large enough"
    if first_fitting(architecture, preferred, CHANGEABLE, machine):
        remedy = f"leave {', '.join(sorted(CHANGEABLE - free))} unset; {remedy}"
    return (
        f"{architecture.name} does not fit {where}: with {least.adapter}, per_device_train_batch_size "
        f"{least.per_device_train_batch_size} and {least.max_length} tokens it needs {need / GIB:.1f} GiB, "
        f"and {machine.bytes / GIB:.1f} GiB are usable; {remedy}, or use a smaller base_model"
    )
