"""The base model's weights and the adapter over them. Loads torch, transformers and peft."""

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


def save_adapter(model: Any, job: TrainingJob) -> None:
    """Write the adapter without the tokenizer (it is the base's, as it is) and without this machine's paths."""
    final, temporary = job.output / ADAPTER, job.output / f".{ADAPTER}.tmp"
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = job.base_model.name
    config.target_modules = sorted(config.target_modules)  # a set, whose order would differ from run to run
    model.save_pretrained(temporary, safe_serialization=True, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)  # a model card of blanks
    temporary.replace(final)


def peak_memory() -> int:
    """The highest use of the scarce memory so far, in bytes: of the GPU where there is one, else resident."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()
