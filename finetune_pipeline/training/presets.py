"""What fits: settings for a memory size and a base model, found by the estimate. Pure functions, no torch.

A preset is a wish (rank, length, examples an update) and a memory size. What of it fits is found by going down one
ladder, the same for presets, for `finetune train plan` and for what is suggested when a training is refused: first a
smaller micro-batch with more accumulation, which changes nothing but speed; then gradient checkpointing, which costs
time; then, where the accumulation is set, fewer examples an update; then QLoRA, which costs some accuracy of the base;
last shorter examples, which costs examples.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.estimate import GIB, Device, memory
from finetune_pipeline.training.job import TrainingError

USABLE = 0.95
"""Share of a card's or machine's memory that a plan counts on; the display and the driver have the rest."""
EXAMPLES_AN_UPDATE = 16
SHORTEST = 256
"""Tokens; a plan does not go below."""
CHANGEABLE = frozenset(
    {"per_device_train_batch_size", "gradient_accumulation_steps", "adapter", "gradient_checkpointing", "max_length"}
)
"""Settings that a plan may change to make a training fit."""


@dataclass(frozen=True)
class Machine:
    """Where a training would run: `bytes` of memory that it may use, and how fast it would be.

    Attributes:
        device: cpu, or gpu.
        bytes: of memory that a training may use.
        bfloat16: whether it would train with bfloat16.
        rate: operations a second that a training reaches.
        source: where the rate is from, in words.
        shards: such machines that the base's weights are dealt out to.
    """

    device: Device
    bytes: float
    bf16: bool
    rate: float
    source: str
    shards: int = 1


@dataclass(frozen=True)
class Preset:
    """A memory size and what is wished for it.

    Attributes:
        gib: memory of the card, or of the machine without one.
        lora_r: rank.
        max_length: tokens.
        card: whose peak rate the time is reckoned with, and that rate (dense bfloat16 with float32 sums, published).
    """

    gib: int
    lora_r: int
    max_length: int
    card: tuple[str, float]

    @property
    def wish(self) -> dict[str, Any]:
        """The settings to begin with."""
        return {
            "adapter": "lora",
            "lora_r": self.lora_r,
            "lora_alpha": 2 * self.lora_r,
            "max_length": self.max_length,
            "per_device_train_batch_size": EXAMPLES_AN_UPDATE,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        }


ASSUMED_SHARE = 0.35
"""Of a card's published peak: what fine-tuning is assumed to reach there. Not measured."""
CPU_RATE = 100e9
"""Operations a second of a training on two cores in float32; `finetune train plan` measures its own machine."""

PRESETS: dict[str, Preset] = {
    "cpu": Preset(16, 16, 512, ("two CPU cores", CPU_RATE / ASSUMED_SHARE)),
    "8gb": Preset(8, 16, 1024, ("an RTX 4060", 60e12)),
    "12gb": Preset(12, 16, 1024, ("an RTX 3060", 51e12)),
    "16gb": Preset(16, 16, 2048, ("an RTX 4060 Ti", 88e12)),
    "24gb": Preset(24, 16, 2048, ("an RTX 3090", 71e12)),
    "48gb": Preset(48, 32, 4096, ("an RTX A6000", 155e12)),
    "80gb": Preset(80, 32, 4096, ("an A100", 312e12)),
}


def machine_of(preset: str) -> Machine:
    """The machine that a preset is for."""
    found = PRESETS[preset]
    name, peak = found.card
    source = f"{ASSUMED_SHARE:.0%} of the published peak of {name} ({peak / 1e12:.3g}), assumed, not measured"
    if preset == "cpu":
        return Machine("cpu", found.gib * GIB * USABLE, False, CPU_RATE, f"{name}, assumed, not measured here")
    return Machine("gpu", found.gib * GIB * USABLE, True, ASSUMED_SHARE * peak, source)


def nearest(gib: float) -> str:
    """The largest preset for a GPU of at most so much memory; the smallest one below it."""
    cards = [name for name, preset in PRESETS.items() if name != "cpu" and preset.gib <= gib * 1.02]
    return max(cards, key=lambda name: PRESETS[name].gib, default="8gb")


def settled(settings: TrainingSettings, architecture: Architecture) -> TrainingSettings:
    """Settings with what they do not set themselves filled from their preset; without a preset, as they are.

    Raises:
        TrainingError: the model does not fit into the preset's memory; the message names what it takes.
    """
    if settings.preset is None:
        return settings
    machine = machine_of(settings.preset)
    wished = with_wish(settings, PRESETS[settings.preset])
    free = CHANGEABLE - settings.model_fields_set
    found = first_fitting(architecture, wished, free, machine)
    if found is None:
        raise TrainingError(does_not_fit(architecture, wished, free, machine, f"preset {settings.preset}"))
    return found


def with_wish(settings: TrainingSettings, preset: Preset) -> TrainingSettings:
    """Settings with what they do not set themselves as the preset wishes it."""
    wish = {name: value for name, value in preset.wish.items() if name not in settings.model_fields_set}
    if "per_device_train_batch_size" not in wish and "gradient_accumulation_steps" in wish:
        wish["gradient_accumulation_steps"] = max(1, EXAMPLES_AN_UPDATE // settings.per_device_train_batch_size)
    if "per_device_train_batch_size" in wish and "gradient_accumulation_steps" not in wish:
        wish["per_device_train_batch_size"] = max(
            fewest(settings), EXAMPLES_AN_UPDATE // settings.gradient_accumulation_steps
        )
    return settings.model_copy(update=wish)


def first_fitting(
    architecture: Architecture, settings: TrainingSettings, free: Set[str], machine: Machine, tokens: int | None = None
) -> TrainingSettings | None:
    """The first settings down the ladder that fit into a machine's memory; None when nothing does.

    Args:
        architecture: of the base model.
        settings: where to begin.
        free: names of the settings that may change.
        machine: whose memory counts.
        tokens: of the longest example; default max_length.
    """
    return next((rung for rung in ladder(settings, free) if fits(architecture, rung, machine, tokens)), None)


def fits(architecture: Architecture, settings: TrainingSettings, machine: Machine, tokens: int | None = None) -> bool:
    """Whether a training's estimate is within a machine's memory."""
    need = memory(architecture, settings, machine.device, bf16=machine.bf16, tokens=tokens, shards=machine.shards)
    return need.bytes <= machine.bytes


def ladder(settings: TrainingSettings, free: Set[str]) -> Iterator[TrainingSettings]:
    """Settings that take less and less memory, by changing only what is free."""
    lengths = [settings.max_length]
    while "max_length" in free and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    adapters = ["lora", "qlora"] if settings.adapter == "lora" and "adapter" in free else [settings.adapter]
    recomputed = settings.gradient_checkpointing
    checkpointing = [False, True] if not recomputed and "gradient_checkpointing" in free else [recomputed]
    updates = (
        list(_updates(settings))
        if "per_device_train_batch_size" in free and "gradient_accumulation_steps" not in free
        else [settings]
    )
    for length in lengths:
        for adapter in adapters:
            for update in updates:
                for recompute in checkpointing:
                    for batch in (
                        _batches(update)
                        if {"per_device_train_batch_size", "gradient_accumulation_steps"} <= free
                        else [update]
                    ):
                        changes = {"max_length": length, "adapter": adapter, "gradient_checkpointing": recompute}
                        yield batch.model_copy(update=changes)


def _updates(settings: TrainingSettings) -> Iterator[TrainingSettings]:
    """Settings with fewer and fewer examples an update, in as many steps."""
    micro = settings.per_device_train_batch_size
    while micro:
        yield settings.model_copy(update={"per_device_train_batch_size": micro})
        micro = halved(micro, micro, fewest(settings))


def _batches(settings: TrainingSettings) -> Iterator[TrainingSettings]:
    """Settings with smaller and smaller micro-batches, and as many examples an update."""
    examples, micro = (
        settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
        settings.per_device_train_batch_size,
    )
    while micro:
        yield settings.model_copy(
            update={"per_device_train_batch_size": micro, "gradient_accumulation_steps": examples // micro}
        )
        micro = halved(micro, examples, fewest(settings))


def fewest(settings: TrainingSettings) -> int:
    """Examples that a device needs at a time: KTO compares each with another one."""
    return 2 if settings.method == "kto" else 1


def halved(micro: int, examples: int, least: int) -> int:
    """The next smaller micro-batch: at most half, and such that whole ones make `examples`; 0 below `least`.

    >>> halved(24, 24, 1), halved(6, 6, 1), halved(5, 5, 1), halved(1, 16, 1), halved(2, 16, 2)
    (12, 3, 1, 0, 0)
    """
    return next((size for size in range(micro // 2, least - 1, -1) if examples % size == 0), 0)


def changes(before: TrainingSettings, after: TrainingSettings) -> dict[str, Any]:
    """What is different in `after`, of the settings that a plan changes."""
    names = [name for name in TrainingSettings.model_fields if name in CHANGEABLE]
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def does_not_fit(
    architecture: Architecture, wished: TrainingSettings, free: Set[str], machine: Machine, where: str
) -> str:
    """What the least of a plan takes where nothing fits, and what to do.

    Args:
        architecture: of the base model.
        wished: where the ladder began.
        free: names of the settings that the plan could change.
        machine: whose memory is too small.
        where: what that memory is called.
    """
    *_, least = ladder(wished, free)
    need = memory(architecture, least, machine.device, bf16=machine.bf16).bytes
    larger = [name for name in PRESETS if name != "cpu" and PRESETS[name].gib * GIB * USABLE >= need]
    remedy = f"the smallest preset for it is {larger[0]}" if larger else "no preset is large enough"
    if first_fitting(architecture, wished, CHANGEABLE, machine):
        remedy = f"leave {', '.join(sorted(CHANGEABLE - free))} to be chosen; {remedy}"
    return (
        f"{architecture.name} does not fit {where}: with {least.adapter}, per_device_train_batch_size "
        f"{least.per_device_train_batch_size} and {least.max_length} tokens it takes {need / GIB:.1f} GiB of "
        f"{machine.bytes / GIB:.1f}; "
        f"{remedy}, or take a smaller base_model"
    )
