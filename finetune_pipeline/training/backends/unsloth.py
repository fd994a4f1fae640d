"""Unsloth: its model and adapter, in the trainer of the backend peft. CUDA only.

Only the construction of the model differs, so progress, checkpoints, resuming and the result are the same.
"""

import os
import platform
from collections.abc import Iterator
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends.base import Availability, Backend, has_nvidia, missing, versions
from finetune_pipeline.training.job import JobConfig, TrainingResult

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of the families that Unsloth knows, as its own examples name them."""


class Unsloth(Backend):
    """Unsloth's kernels on one NVIDIA GPU."""

    name = "unsloth"

    def check(self) -> Availability:  # noqa: D102
        if platform.system() != "Linux":
            return Availability("unsloth", False, f"runs on Linux only, this is {platform.system()}", "use peft")
        if not has_nvidia():
            why = "no NVIDIA GPU was found (no nvidia-smi)"
            return Availability("unsloth", False, why, "use peft, or a machine with a GPU")
        if missing("unsloth"):
            return Availability(
                "unsloth", False, "not installed", ".venv/bin/pip install -c constraints.txt -e '.[unsloth]'"
            )
        return Availability("unsloth", True, f"{versions('unsloth')}; trains on one GPU")

    def cannot(self, settings: TrainingSettings) -> Iterator[str]:  # noqa: D102
        if settings.compute == "ray" or settings.num_processes > 1:
            yield "it trains on one GPU of this machine; set compute: local and num_processes: 1, or backend: peft"
        if not settings.bf16:
            yield "it trains in bfloat16; leave bf16 true, or set backend: peft"
        if settings.trainable_token_indices:
            yield "it cannot train the embeddings of single tokens; leave trainable_token_indices out, or use peft"
        if settings.mode == "incremental":
            yield "it begins with a new adapter; set mode: full, or backend: peft"

    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:  # noqa: D102
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        # It writes what it compiles; without this into the folder where the process stands.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(job.output / "unsloth_compiled"))
        import unsloth  # noqa: F401  # replaces parts of trl, transformers and peft, so it has to come before them

        from finetune_pipeline.training.trainer import run_training

        return run_training(job, started, micro_batch, load_model=_load_model)


def _load_model(job: JobConfig, bf16: bool) -> Any:
    import torch
    from unsloth import FastLanguageModel

    kind = torch.bfloat16 if bf16 else torch.float16
    model, _ = FastLanguageModel.from_pretrained(**model_arguments(job), dtype=kind)
    return FastLanguageModel.get_peft_model(model, **adapter_arguments(job.settings))


def model_arguments(job: JobConfig) -> dict[str, Any]:
    """What FastLanguageModel.from_pretrained is told, without the dtype."""
    settings = job.settings
    return {
        "model_name": str(job.base_model),
        "max_seq_length": settings.max_length,
        "load_in_4bit": settings.adapter == "qlora",
        "load_in_16bit": settings.adapter == "lora",
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "use_exact_model_name": True,  # else it may take another model, of the same name, from the hub
        "max_lora_rank": settings.lora_r,
        "random_state": settings.seed,
        "trust_remote_code": False,
    }


def adapter_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """What FastLanguageModel.get_peft_model is told."""
    every = settings.lora_target_modules == "all-linear"
    return {
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(LINEAR_LAYERS if every else settings.lora_target_modules),
        "bias": "none",
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "random_state": settings.seed,
        "max_seq_length": settings.max_length,
    }
