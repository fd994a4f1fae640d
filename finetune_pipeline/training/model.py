"""The base model's weights and the adapter over them. Loads torch, transformers and peft."""

import json
import re
import shutil
from typing import Any

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training import distributed
from finetune_pipeline.training.hardware import peak_resident_bytes
from finetune_pipeline.training.job import ADAPTER, JobConfig, TrainingError

_WEIGHTS_FRACTION = 0.7  # of a GPU's memory; the rest is for activations, gradients and the optimizer


def load_model(job: JobConfig, bf16: bool) -> Any:
    """Load the frozen base weights: in bfloat16 if that is what is computed in, in 4 bits for qlora.

    Frozen float32 weights would be cast in every step: autocast caches casts of trained weights only.

    Raises:
        TrainingError: transformers does not have the attention implementation for this model or machine.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    attention = job.settings.attn_implementation
    if attention is not None:
        arguments["attn_implementation"] = attention
    if job.settings.adapter == "qlora":
        arguments["device_map"] = {"": distributed.local_rank() if torch.cuda.is_available() else "cpu"}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(job.base_model, **arguments)
    except (ImportError, ValueError) as error:
        if attention is None:
            raise
        raise TrainingError(
            f"attn_implementation {attention} cannot be used: {error}; leave it out, or set attn_implementation: sdpa"
        ) from error
    if job.settings.adapter == "lora":
        return model
    from bitsandbytes.nn.modules import Linear4bit
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX-512 bfloat16, bitsandbytes 0.50 repacks 4-bit weights for inference when the loss is
            # measured, into a layout without a backward pass: training then goes on with silently wrong gradients,
            # and some shapes fail outright.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.settings.gradient_checkpointing)


def adapter_arguments(base: Any, job: JobConfig) -> dict[str, Any]:
    """Return the arguments `model` and `peft_config` of TRL's trainers: for a new adapter, or the initial one."""
    from peft import PeftModel

    if job.initial_adapter is not None:
        base = PeftModel.from_pretrained(base, job.initial_adapter, is_trainable=True, use_safetensors=True)
    return {"model": base, "peft_config": None if isinstance(base, PeftModel) else lora_config(job.settings, base)}


def cast_adapter_to_float32(model: Any, job: JobConfig) -> None:
    """Undo TRL's cast of an adapter over 4-bit weights to bfloat16, in which small steps are lost.

    Checkpoints are loaded in float32, so a resumed run would also differ from an uninterrupted one.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if job.initial_adapter is not None:  # the cast has already rounded its weights
        model.load_adapter(job.initial_adapter, "default", is_trainable=True, use_safetensors=True)


def must_shard(job: JobConfig, bf16: bool) -> bool:
    """Return whether one GPU cannot hold the base weights, so that they are sharded across ranks (FSDP)."""
    import torch

    if distributed.world_size() == 1 or not torch.cuda.is_available() or job.settings.adapter == "qlora":
        return False
    config = json.loads((job.base_model / "config.json").read_text(encoding="utf-8"))
    stored = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    count = sum(path.stat().st_size for path in job.base_model.glob("*.safetensors")) / stored
    memory = torch.cuda.get_device_properties(distributed.local_rank()).total_memory
    return bool(count * (2 if bf16 else 4) > _WEIGHTS_FRACTION * memory)


def lora_config(settings: TrainingSettings, model: Any) -> Any:
    """Return PEFT's configuration of a new adapter over a model.

    Raises:
        TrainingError: a trained token is not in the model's vocabulary, a target module is not in the model, or PEFT
            rejects a field.
    """
    from peft import LoraConfig
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    targets = settings.lora_target_modules
    exclude = None
    if model.config.get_text_config(decoder=True) is not model.config:
        # Modules beside the language model, such as a vision tower, get no adapter.
        decoder = model.get_decoder()
        (name,) = [name for name, module in model.named_modules() if module is decoder]
        exclude = rf"(?!{re.escape(name)}\.).*"
    if not isinstance(targets, str):
        # PEFT ignores names that it does not find, or fails without saying which.
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, Linear | Embedding | Conv1D) and not (exclude and re.fullmatch(exclude, name))
        ]
        unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
        if unknown:
            raise TrainingError(
                f"lora_target_modules names {', '.join(unknown)}, but the layers of the base model that can take LoRA "
                f"are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}; name some of these, or set "
                "lora_target_modules: all-linear"
            )
    parameters = [name for name, _ in model.named_parameters()]
    for target in settings.lora_config.get("target_parameters") or ():
        if not any(f".{name}".endswith(f".{target}") for name in parameters):  # PEFT would only warn
            raise TrainingError(
                f"lora_config.target_parameters names {target}, but the base model has no such parameter; name one of "
                "its parameters, by the end of its name, or leave target_parameters out"
            )
    try:
        return LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=exclude,
            trainable_token_indices=trained_tokens(settings, model.get_input_embeddings().num_embeddings) or None,
            task_type="CAUSAL_LM",
            **settings.lora_config,
        )
    except (TypeError, ValueError) as error:
        raise TrainingError(f"PEFT rejects lora_config {settings.lora_config}: {error}") from error


def trained_tokens(settings: TrainingSettings, vocabulary: int) -> list[int]:
    """Return the ids of the tokens whose embeddings are trained.

    Raises:
        TrainingError: an id is not in a vocabulary of that size.
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


def reshard(model: Any) -> None:
    """Reshard FSDP modules that an evaluation left unsharded, since no backward pass followed.

    No checkpoint can be loaded into unsharded modules.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_trained_weights(model: Any) -> Any:
    """Return the full trained weights of a sharded model; every rank has to call this. None if it is not sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def save_adapter(model: Any, job: JobConfig, weights: Any = None) -> None:
    """Write the adapter, without the tokenizer (the base's is unchanged) and without paths of this machine.

    Args:
        model: the base with its adapter.
        job: whose output folder it is written to.
        weights: from `gather_trained_weights`; written instead of the model's own unless they are None.
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
        selected_adapters=["default"],  # a warm-started DPO has its reference beside it
    )
    (temporary / "README.md").unlink(missing_ok=True)  # an empty model card
    temporary.replace(final)


def memory_in_use() -> int:
    """Return the memory in use in bytes: of the GPU where there is one, else resident."""
    import psutil
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the peak memory in bytes: of the GPU where there is one, else resident."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()
