"""The base model's weights and the adapter over them. Loads torch, transformers and peft."""

import json
import shutil
from pathlib import Path
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import team
from finetune_pipeline.training.job import ADAPTER, TrainingJob
from finetune_pipeline.training.process import peak_resident_bytes

_SMALL_BATCH = 16  # below it, bfloat16 autocast gains nothing on a CPU


def bfloat16_is_faster(batch_size: int) -> bool:
    """On a GPU that has it; on a CPU with instructions for it, once the batch is large enough to pay for the casts."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if batch_size < _SMALL_BATCH or not Path("/proc/cpuinfo").exists():
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def load_model(job: TrainingJob, bfloat16: bool) -> Any:
    """The base model's weights: full precision on a CPU, bfloat16 on a GPU, 4-bit with qlora."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if gpu and bfloat16 else torch.float32
    arguments: dict[str, Any] = {"dtype": kind, "use_safetensors": True, "trust_remote_code": False}
    if job.settings.adapter == "lora":
        return AutoModelForCausalLM.from_pretrained(job.base_model, **arguments)
    from peft import prepare_model_for_kbit_training

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    device = {"": team.device_index()} if gpu else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        job.base_model, quantization_config=four_bits, device_map=device, **arguments
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.settings.gradient_checkpointing)


_WEIGHTS_SHARE = 0.7  # of a card's memory; the rest is for activations, gradients and the optimizer


def must_shard(job: TrainingJob) -> bool:
    """Whether the base's weights are dealt out to the GPUs of the team (FSDP), since one cannot hold them."""
    import torch

    if team.size() == 1 or not torch.cuda.is_available() or job.settings.adapter == "qlora":
        return False
    card = torch.cuda.get_device_properties(team.device_index()).total_memory
    return weights_exceed_card(job.base_model, 2 if bfloat16_is_faster(1) else 4, card)


def weights_exceed_card(base_model: Path, bytes_each: int, card_bytes: int) -> bool:
    """Whether a base model leaves too little of a card's memory for training.

    Args:
        base_model: its folder; the weights there are counted by the size of their files.
        bytes_each: of a weight, as it is trained.
        card_bytes: memory of the card.
    """
    kind = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    stored = 4 if (kind.get("dtype") or kind.get("torch_dtype")) == "float32" else 2
    weights = sum(path.stat().st_size for path in base_model.glob("*.safetensors")) / stored * bytes_each
    return weights > _WEIGHTS_SHARE * card_bytes


def sharding() -> dict[str, Any]:
    """What Hugging Face's Trainer is told of FSDP: layers are wrapped each, checkpoints hold whole weights."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def lora(settings: TrainingSettings) -> Any:
    """The configuration of a new adapter, as PEFT takes it."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def shard(trainer: Any) -> None:
    """Deal the weights out before anything is computed with them: whole they would not fit."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # What the Trainer does when it begins to train, where it leaves a model alone that is sharded already.
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)


def whole_weights(model: Any) -> Any:
    """The trained weights of a sharded model, put together: every process has to ask. None if the model is whole."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def save_adapter(model: Any, job: TrainingJob, weights: Any = None) -> None:
    """Write the adapter without the tokenizer (it is the base's, as it is) and without this machine's paths.

    Args:
        model: the base with its adapter.
        job: says where to.
        weights: whole_weights(model); they go into the file instead of the model's own, if there are any.
    """
    final, temporary = job.output / ADAPTER, job.output / f".{ADAPTER}.tmp"
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = job.base_model.name
    config.target_modules = sorted(config.target_modules)  # a set, whose order would differ from run to run
    model.save_pretrained(temporary, state_dict=weights, safe_serialization=True, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)  # a model card of blanks
    temporary.replace(final)


def peak_memory() -> int:
    """The highest use of the scarce memory so far, in bytes: of the GPU where there is one, else resident."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()
