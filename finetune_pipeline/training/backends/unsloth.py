"""Unsloth: its model and adapter, in the trainer of the backend peft. CUDA only.

Only the construction of the model differs, so progress, checkpoints, resuming and the result are the same.
"""

import os
import platform
from collections.abc import Iterator
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends.base import Availability, TrainingBackend, has_nvidia, missing, versions
from finetune_pipeline.training.job import JobConfig, TrainingResult

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of the architectures that Unsloth supports, as its own examples name them."""
LORA_FIELDS = {"bias", "init_lora_weights", "layers_pattern", "layers_to_transform"}
"""Fields of `lora_config` that FastLanguageModel.get_peft_model takes."""


class Unsloth(TrainingBackend):
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

    def unsupported(self, settings: TrainingSettings) -> Iterator[str]:  # noqa: D102
        if settings.compute == "ray" or settings.num_processes > 1:
            yield "it trains on one GPU of this machine; set compute: local and num_processes: 1, or backend: peft"
        if not settings.bf16:
            yield "it trains in bfloat16; leave bf16 true, or set backend: peft"
        if settings.trainable_token_indices:
            yield "it cannot train single token embeddings; leave trainable_token_indices out, or set backend: peft"
        if settings.mode == "incremental":
            yield "it starts with a new adapter; set mode: full, or backend: peft"
        if settings.use_dora:
            yield "it has no DoRA; leave use_dora out, or set backend: peft"
        if settings.attn_implementation is not None:
            yield "it has its own attention; leave attn_implementation out, or set backend: peft"
        if unknown := sorted(settings.lora_config.keys() - LORA_FIELDS):
            yield f"it does not take lora_config {', '.join(unknown)}; leave it out, or set backend: peft"

    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:  # noqa: D102
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        # Where it writes compiled code; by default into the current folder.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(job.output / "unsloth_compiled"))
        import unsloth  # noqa: F401  # patches trl, transformers and peft, so it has to be imported before them

        from finetune_pipeline.training.trainer import run_training

        return run_training(job, started, micro_batch, load_model=_load_model)


def _load_model(job: JobConfig, bf16: bool) -> Any:
    import torch
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if bf16 else torch.float16
    model, _ = FastLanguageModel.from_pretrained(**model_arguments(job), dtype=dtype)
    return FastLanguageModel.get_peft_model(model, **lora_arguments(job.settings))


def model_arguments(job: JobConfig) -> dict[str, Any]:
    """Return the arguments of FastLanguageModel.from_pretrained, without the dtype."""
    settings = job.settings
    return {
        "model_name": str(job.base_model),
        "max_seq_length": settings.max_length,
        "load_in_4bit": settings.adapter == "qlora",
        "load_in_16bit": settings.adapter == "lora",
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "use_exact_model_name": True,  # else it may load another model of the same name from the hub
        "max_lora_rank": settings.lora_r,
        "random_state": settings.seed,
        "trust_remote_code": False,
    }


def lora_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """Return the arguments of FastLanguageModel.get_peft_model."""
    every = settings.lora_target_modules == "all-linear"
    return {
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(LINEAR_LAYERS if every else settings.lora_target_modules),
        "bias": "none",
        "use_rslora": settings.use_rslora,
        "use_gradient_checkpointing": "unsloth" if settings.gradient_checkpointing else False,
        "random_state": settings.seed,
        "max_seq_length": settings.max_length,
        **settings.lora_config,
    }
