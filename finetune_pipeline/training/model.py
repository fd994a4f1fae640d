"""The base model's weights and the adapter over them. Loads torch, transformers and peft."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import distributed
from finetune_pipeline.training.job import ADAPTER, JobConfig, TrainingError
from finetune_pipeline.training.process import peak_resident_bytes

_SMALL_BATCH = 8  # below it, bfloat16 autocast gains nothing on a CPU; at 8 it is 1.15 times as fast, at 24 1.5


def bfloat16_is_faster(batch_size: int) -> bool:
    """On a GPU that has it; on a CPU with instructions for it, once the batch is large enough to pay for the casts."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if batch_size < _SMALL_BATCH or not Path("/proc/cpuinfo").exists():
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def load_model(job: JobConfig, bf16: bool) -> Any:
    """The base model's frozen weights: in bfloat16 if that is what is computed in, 4-bit with qlora.

    Frozen float32 weights would be cast anew in every step: autocast remembers a cast of trained weights only.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if bf16 else torch.float32
    arguments: dict[str, Any] = {"dtype": kind, "use_safetensors": True, "trust_remote_code": False}
    if job.settings.adapter == "lora":
        return AutoModelForCausalLM.from_pretrained(job.base_model, **arguments)
    from peft import prepare_model_for_kbit_training

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    device = {"": distributed.device_index()} if gpu else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        job.base_model, quantization_config=four_bits, device_map=device, **arguments
    )
    _keep_weights_as_they_are(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.settings.gradient_checkpointing)


def _keep_weights_as_they_are(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference when the loss is measured.

    On a CPU with AVX-512 bfloat16, the first evaluation packs them into a layout that has no backward pass: training
    went on afterwards with gradients that were silently wrong (bitsandbytes 0.50), and some shapes fail outright.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapter(base: Any, job: JobConfig) -> dict[str, Any]:
    """The arguments `model` and `peft_config` of TRL's trainers: a new adapter, or the one that is gone on from."""
    from peft import PeftModel

    if job.initial_adapter is not None:
        base = PeftModel.from_pretrained(base, job.initial_adapter, is_trainable=True, use_safetensors=True)
    return {"model": base, "peft_config": None if isinstance(base, PeftModel) else lora(job.settings, base)}


def train_in_float32(model: Any, job: JobConfig) -> None:
    """Undo TRL's cast of an adapter over 4-bit weights to bfloat16, in which small steps are lost.

    A checkpoint is loaded in float32, so that a resumed training would be another one than an unbroken one.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if job.initial_adapter is not None:  # what the cast cut off is in its file
        model.load_adapter(job.initial_adapter, "default", is_trainable=True, use_safetensors=True)


_WEIGHTS_SHARE = 0.7  # of a card's memory; the rest is for activations, gradients and the optimizer


def must_shard(job: JobConfig, bf16: bool) -> bool:
    """Whether the base's weights, in bfloat16 or not, are dealt out to the team's GPUs (FSDP): one cannot hold them."""
    import torch

    if distributed.size() == 1 or not torch.cuda.is_available() or job.settings.adapter == "qlora":
        return False
    card = torch.cuda.get_device_properties(distributed.device_index()).total_memory
    return weights_exceed_card(job.base_model, 2 if bf16 else 4, card)


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


def lora(settings: TrainingSettings, model: Any) -> Any:
    """The configuration of a new adapter over a model, as PEFT takes it.

    Raises:
        TrainingError: a token whose embedding is to be trained is not in the model's vocabulary, or a module that is
            to be adapted is not in the model.
    """
    from peft import LoraConfig

    targets, beside = settings.lora_target_modules, _beside_language_model(model)
    if not isinstance(targets, str):
        _must_have(model, targets, beside)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=beside,
        trainable_token_indices=trained_tokens(settings, model.get_input_embeddings().num_embeddings) or None,
        task_type="CAUSAL_LM",
    )


def _must_have(model: Any, targets: Sequence[str], beside: str | None) -> None:
    """Refuse names that no layer has which can take an adapter; PEFT passes over them, or fails without the names."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding | Conv1D) and not (beside and re.fullmatch(beside, name))
    ]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown:
        raise TrainingError(
            f"lora_target_modules names {', '.join(unknown)}, but the layers of the base model that can take LoRA are "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in layers}))}; name some of these, or set "
            "lora_target_modules: all-linear"
        )


def _beside_language_model(model: Any) -> str | None:
    """A pattern of the modules beside the language model (a vision tower), which take no adapter; None has none."""
    if model.config.get_text_config(decoder=True) is model.config:
        return None
    decoder = model.get_decoder()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    return rf"(?!{re.escape(name)}\.).*"


def trained_tokens(settings: TrainingSettings, vocabulary: int) -> list[int]:
    """The ids of the tokens whose embeddings are trained.

    Raises:
        TrainingError: one of them is not in a vocabulary of that size.
    """
    if settings.trainable_token_indices == "all":
        return list(range(vocabulary))
    unknown = [token for token in settings.trainable_token_indices if not 0 <= token < vocabulary]
    if unknown:
        raise TrainingError(
            f"trainable_token_indices names {', '.join(map(str, unknown))}, but the base model's tokens have the ids 0 "
            f"to {vocabulary - 1}"
        )
    return sorted(set(settings.trainable_token_indices))


def shard(trainer: Any) -> None:
    """Deal the weights out before anything is computed with them: whole they would not fit."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # What the Trainer does when it begins to train, where it leaves a model alone that is sharded already.
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)


def deal_out_again(model: Any) -> None:
    """Shard what measuring a loss left whole, as no backward pass followed: no checkpoint can be loaded into that."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: Any) -> Any:
    """The trained weights of a sharded model, put together: every process has to ask. None if the model is whole."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def save_adapter(model: Any, job: JobConfig, weights: Any = None) -> None:
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
    model.save_pretrained(
        temporary,
        state_dict=weights,
        safe_serialization=True,
        save_embedding_layers=False,
        selected_adapters=["default"],  # DPO on top of an adapter has its reference beside it
    )
    (temporary / "README.md").unlink(missing_ok=True)  # a model card of blanks
    temporary.replace(final)


def memory_now() -> int:
    """The use of the scarce memory now, in bytes: of the GPU where there is one, else resident."""
    import psutil
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The highest use of the scarce memory so far, in bytes: of the GPU where there is one, else resident."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()
