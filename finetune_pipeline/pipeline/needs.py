"""Disk and memory of each stage of a run, from training to serving, compared with what is free. No torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.export.merge import FLOAT32_LIMIT
from finetune_pipeline.settings import LoopSettings, TrainingSettings, home
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.estimate import PROCESS_BYTES, Device
from finetune_pipeline.training.hardware import main_memory

BYTES_PER_WEIGHT = {"F16": 2.0, "Q8_0": 1.07, "Q6_K": 0.83, "Q5_K_M": 0.72, "Q4_K_M": 0.61, "Q4_0": 0.57}
"""Of a GGUF. K-quants of models whose width is no multiple of 256 are larger, up to Q8_0."""
CHECKPOINTS = 3
"""Checkpoints that training keeps: the best one, the newest, and the one before it while the newest is incomplete."""
GB = 1e9


@dataclass(frozen=True)
class StageNeed:
    """What a stage of a run needs at most.

    Attributes:
        disk: bytes that it writes.
        memory: bytes of main memory, or of the GPU.
        device: whose memory it is.
        formula: in words.
    """

    stage: str
    disk: int
    memory: int
    device: Device
    formula: str


@dataclass(frozen=True)
class FreeSpace:
    """What is free here, in bytes: on the disk of the home, and in main memory."""

    disk: int
    memory: int


def free_space() -> FreeSpace:
    """Return what is free on this machine."""
    existing = next(folder for folder in (home(), *home().parents) if folder.exists())
    return FreeSpace(shutil.disk_usage(existing).free, main_memory())


def stage_needs(
    architecture: Architecture,
    loop: LoopSettings,
    training: TrainingSettings,
    training_memory: int,
    device: Device,
    *,
    gguf: Path | None = None,
) -> tuple[StageNeed, ...]:
    """Return what each stage of a run of a loop needs.

    Args:
        training: the settings that train.
        training_memory: the estimated peak of training, in bytes.
        device: to train on.
        gguf: the base model, if it is a GGUF.
    """
    weights, trained = architecture.parameters, architecture.trained(training)
    size = 4 if weights <= FLOAT32_LIMIT else 2
    merged = loop.export.form == "merged"
    per_weight = BYTES_PER_WEIGHT[loop.export.quantization]
    largest = 4 * max(architecture.vocabulary * architecture.hidden, architecture.hidden * architecture.ffn)
    stages: list[StageNeed] = []

    def add(stage: str, disk: float, memory: float, formula: str, device: Device = "cpu") -> None:
        stages.append(StageNeed(stage, round(disk), round(memory), device, formula))

    if gguf is not None:
        add("read the GGUF", 2 * weights, PROCESS_BYTES + 4 * weights, "weights at 2 B on disk, 4 B in memory, once")
    add(
        "training",
        (CHECKPOINTS * 12 + 4) * trained,
        training_memory,
        f"{CHECKPOINTS} checkpoints of 12 B for each trained weight, and the adapter",
        device,
    )
    if merged:
        add("merge", size * weights, PROCESS_BYTES + size * weights, f"weights at {size} B, deleted after conversion")
        add("F16", 2 * weights, PROCESS_BYTES + 2 * largest, "a GGUF of 2 B for each weight, tensor by tensor")
        if loop.export.quantization != "F16":
            name = loop.export.quantization
            add("quantization", per_weight * weights, 2 * largest, f"{name}: {per_weight:g} B for each weight")
    else:
        add("adapter", 2 * trained, PROCESS_BYTES + size * weights, "a GGUF of the adapter; its answers are compared")
    served = gguf.stat().st_size if gguf is not None and not merged else round(per_weight * weights)
    cells = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * 2
    tokens = loop.context * loop.evaluation.parallel
    add("serving", 0, served + cells * tokens, f"the GGUF, and {cells:,} B for each of {tokens:,} tokens in the cache")
    return tuple(stages)


def shortages(needs: tuple[StageNeed, ...], free: FreeSpace) -> list[str]:
    """Return what does not suffice, one sentence for each; memory of a GPU is not compared.

    The disk has to hold what all stages write, since merged weights are deleted only after the conversion.
    """
    found = []
    disk = sum(one.disk for one in needs)
    if disk > free.disk:
        found.append(
            f"a run writes up to {disk / GB:.1f} GB, and {free.disk / GB:.1f} GB are free in {home()}; free some, or "
            "set FINETUNE_HOME to another disk"
        )
    for one in needs:
        if one.device == "cpu" and one.memory > free.memory:
            found.append(
                f"{one.stage} needs about {one.memory / GB:.1f} GB of memory, and {free.memory / GB:.1f} GB are free; "
                "free some, or use a smaller base_model"
            )
    return found
