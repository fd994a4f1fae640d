"""Fields of TRL's trainer configurations and PEFT's LoraConfig that a loop's YAML may pass through.

The fields are read from the libraries' source files by their syntax tree: importing trl takes seconds and loads torch,
and every command reads settings.
"""

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.validation_messages import nearest, sentence_error

TRAINER_CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig"}
"""TRL's configuration class of each training method."""

_FILES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
    "SchedulerType": ("transformers", "trainer_utils.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "KTOConfig": ("trl", "trainer/kto_config.py"),
    "DPOTrainer": ("trl", "trainer/dpo_trainer.py"),
    "KTOTrainer": ("trl", "trainer/kto_trainer.py"),
    "PeftConfigMixin": ("peft", "config.py"),
    "PeftConfig": ("peft", "config.py"),
    "LoraConfig": ("peft", "tuners/lora/config.py"),
}

_VALIDATION = "validation runs whenever a checkpoint is saved; set training.save_steps"
_TOKENIZED = "examples are tokenized before training, as they are tokenized when the model serves"
_BEST = "the weights with the lowest validation loss become the adapter"
_PUSH = "training never pushes to the Hub"
_SHARDING = "processes are started by training.num_processes, and weights are sharded where one GPU cannot hold them"
_MODEL = "the base model is loaded by the training; see training.attn_implementation and training.bf16"

RESERVED: dict[str, str] = {
    # A setting of the same or another name reaches these fields.
    **{
        name: f"set training.{name}"
        for name in (
            "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "gradient_checkpointing", "bf16", "seed",
            "logging_steps", "save_steps", "report_to", "max_length", "beta", "loss_weights",
        )
    },
    "loss_type": "set training.loss_type for dpo or kto; the loss of sft is cross-entropy on completion tokens",
    "output_dir": "every training run has its own folder among the artifacts",
    "run_name": "it is the training's key, by which a killed training run finds its checkpoints",
    "resume_from_checkpoint": "a training run resumes from its last complete checkpoint by itself",
    "ignore_data_skip": "a resumed training has to continue with the examples that are left",
    "restore_callback_states_from_checkpoint": "a training run resumes from its last complete checkpoint by itself",
    "do_train": _VALIDATION,
    "do_eval": _VALIDATION,
    "do_predict": _VALIDATION,
    "eval_strategy": _VALIDATION,
    "eval_steps": _VALIDATION,
    "eval_delay": _VALIDATION,
    "eval_on_start": _VALIDATION,
    "eval_packing": _VALIDATION,
    "prediction_loss_only": _VALIDATION,
    "include_for_metrics": _VALIDATION,
    "batch_eval_metrics": _VALIDATION,
    "bf16_full_eval": _VALIDATION,
    "fp16_full_eval": _VALIDATION,
    "eval_accumulation_steps": _VALIDATION,
    "eval_do_concat_batches": _VALIDATION,
    "eval_use_gather_object": _VALIDATION,
    "load_best_model_at_end": "set training.load_best_model_at_end",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "logging_strategy": "set training.logging_steps",
    "logging_nan_inf_filter": "a training run with a non-finite loss ends at once",
    "disable_tqdm": "progress is in progress.jsonl and in the run's log",
    "save_strategy": "set training.save_steps",
    "save_total_limit": "the best checkpoint and the two newest are kept until the training is done",
    "save_only_model": "a killed training run resumes with its optimizer state",
    "save_on_each_node": "rank 0 writes checkpoints",
    "auto_find_batch_size": "a training run that runs out of memory continues with half the micro-batch by itself",
    "accelerator_config": "all processes have to draw the same order of examples",
    "dataloader_drop_last": "every example is trained on",
    "label_smoothing_factor": "set label_smoothing for dpo; sft and kto have none",
    "use_cpu": "the device is a GPU where there is one",
    "data_seed": "set training.seed",
    "train_sampling_strategy": "the order of examples follows from training.seed",
    "length_column_name": _TOKENIZED,
    "remove_unused_columns": _TOKENIZED,
    "label_names": _TOKENIZED,
    "dataset_text_field": _TOKENIZED,
    "dataset_kwargs": _TOKENIZED,
    "dataset_num_proc": _TOKENIZED,
    "shuffle_dataset": _TOKENIZED,
    "chat_template_path": _TOKENIZED,
    "eos_token": _TOKENIZED,
    "pad_token": _TOKENIZED,
    "truncation_mode": "longer examples are left out: a truncated one would train a completion without EOS token",
    "completion_only_loss": _TOKENIZED,
    "assistant_only_loss": _TOKENIZED,
    "packing": "batches are already padding-free where the architecture allows it",
    "packing_strategy": "batches are already padding-free where the architecture allows it",
    "padding_free": "batches are already padding-free where the architecture allows it",
    "use_liger_kernel": "the loss is computed in chunks already, and Liger would replace that",
    "liger_kernel_config": "the loss is computed in chunks already, and Liger would replace that",
    "model_init_kwargs": _MODEL,
    "trust_remote_code": "code of a model repository is never run",
    "push_to_hub": _PUSH,
    "hub_token": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "parallelism_config": _SHARDING,
    "local_rank": _SHARDING,
    "ddp_find_unused_parameters": _SHARDING,
}  # fmt: skip
"""Fields that a training sets itself, each with the reason or the setting to use."""

_NOT_EXPORTED = "export to GGUF supports no such adapter"
_BASE_CHANGED = "it changes the base weights, and the adapter is exported over the original ones"

RESERVED_LORA: dict[str, str] = {
    "r": "set training.lora_r",
    "lora_alpha": "set training.lora_alpha",
    "lora_dropout": "set training.lora_dropout",
    "target_modules": "set training.lora_target_modules",
    "use_rslora": "set training.use_rslora",
    "use_dora": "set training.use_dora",
    "trainable_token_indices": "set training.trainable_token_indices",
    "task_type": "it is always CAUSAL_LM",
    "peft_type": "it is always LORA",
    "peft_version": "PEFT writes it",
    "auto_mapping": "PEFT writes it",
    "inference_mode": "PEFT writes it",
    "base_model_name_or_path": "set base_model",
    "revision": "set base_model",
    "exclude_modules": "modules outside the language model are excluded; set training.lora_target_modules",
    "modules_to_save": "fully trained modules are not exported; set training.trainable_token_indices for embeddings",
    "loftq_config": _BASE_CHANGED,
    "corda_config": _BASE_CHANGED,
    "lora_ga_config": _BASE_CHANGED,
    "eva_config": "its initialization needs a pass over data that a training run does not make",
    "layer_replication": _NOT_EXPORTED,
    "megatron_config": _NOT_EXPORTED,
    "megatron_core": _NOT_EXPORTED,
    "alora_invocation_tokens": _NOT_EXPORTED,
    "use_qalora": _NOT_EXPORTED,
    "qalora_group_size": _NOT_EXPORTED,
    "use_bdlora": _NOT_EXPORTED,
    "arrow_config": _NOT_EXPORTED,
    "monteclora_config": _NOT_EXPORTED,
    "velora_config": _NOT_EXPORTED,
    "kasa_config": _NOT_EXPORTED,
}
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


def check_trainer_config(given: Mapping[str, Any], method: str) -> None:
    """Check fields for TRL's configuration class of a method.

    Args:
        given: by field name.
        method: sft, dpo, kto, or auto; for auto every class must have the field, since any may be chosen.

    Raises:
        ValueError: a field is unknown, has a value of the wrong type, or is set by the training itself.
    """
    names = list(TRAINER_CONFIGS.values()) if method == "auto" else [TRAINER_CONFIGS[method]]
    _check(given, names, RESERVED)


def check_lora_config(given: Mapping[str, Any]) -> None:
    """Check fields for PEFT's LoraConfig.

    Raises:
        ValueError: as for `check_trainer_config`.
    """
    _check(given, ["LoraConfig"], RESERVED_LORA)
    if given.get("init_lora_weights", True) not in _INITIALIZATIONS:
        raise sentence_error(
            f"init_lora_weights {given['init_lora_weights']!r} cannot be used: {_BASE_CHANGED}; use one of "
            f"{', '.join(map(str, _INITIALIZATIONS))}"
        )


def check_losses(given: Sequence[str], method: str) -> None:
    """Check names of losses for TRL's trainer of a method.

    Raises:
        ValueError: the method has only one loss, or TRL has no such loss.
    """
    if method not in ("dpo", "kto"):
        loss = "the loss of sft is cross-entropy on completion tokens"
        remedy = "leave loss_type out, or set method: dpo or kto"
        raise sentence_error(
            f"{loss}, and method: auto may choose sft; {remedy}" if method == "auto" else f"{loss}; {remedy}"
        )
    if not given or (method == "kto" and len(given) > 1):
        raise sentence_error(
            f"{method} cannot use {len(given)} losses; name one" + (" or more" if method == "dpo" else "")
        )
    tree = _class({"dpo": "DPOTrainer", "kto": "KTOTrainer"}[method])
    # The trainers compare loss_type with each name that they know.
    known = {
        name.value
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.Compare) and ast.unparse(node.left).rpartition(".")[2] == "loss_type"
        for name in node.comparators
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    }
    for name in given:
        if known and name not in known:
            raise sentence_error(f"TRL's {method} has no loss {name!r}; {_did_you_mean(name, sorted(known))}")


def check_member(value: str, enumeration: Literal["OptimizerNames", "SchedulerType"]) -> str:
    """Return `value` if it is one of an enumeration of transformers, else raise ValueError with the nearest."""
    tree = _class(enumeration)
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign)] if tree else []
    known = [str(value.value) for value in assigned if isinstance(value, ast.Constant)]
    if known and value not in known:
        kind = {"OptimizerNames": "optimizer", "SchedulerType": "learning-rate schedule"}[enumeration]
        raise sentence_error(f"transformers has no {kind} {value!r}; {_did_you_mean(value, known)}")
    return value


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    meant = nearest(name, known)
    return f"did you mean {meant}?" if meant else f"it has {', '.join(sorted(known))}"


def _check(given: Mapping[str, Any], classes: Sequence[str], reserved: Mapping[str, str]) -> None:
    problems = []
    for name, value in given.items():
        if name in reserved:
            problems.append(f"{name} cannot be set here: {reserved[name]}")
            continue
        for kind in classes:
            fields = fields_of(kind)
            if fields and name not in fields:
                problems.append(f"{kind} has no field {name}{_remedy(name, fields, classes)}")
                break
            if fields and not _fits(value, fields[name]):
                problems.append(f"{name} is {value!r}, and {kind} expects {fields[name]}")
                break
    if problems:
        raise sentence_error("; ".join(problems))


def _remedy(name: str, fields: Iterable[str], classes: Sequence[str]) -> str:
    """Return what to do about a field that a class does not have."""
    having = [method for method, kind in TRAINER_CONFIGS.items() if name in fields_of(kind)]
    if having and classes[0] in TRAINER_CONFIGS.values():
        auto = ", and method: auto needs a field that every method has" if len(classes) > 1 else ""
        kinds = " and ".join(TRAINER_CONFIGS[method] for method in having)
        return f"{auto}; {kinds} {'has' if len(having) == 1 else 'have'} it: set method: {' or '.join(having)}"
    meant = nearest(name, fields)
    return f"; did you mean {meant}?" if meant else ""


def fields_of(name: str) -> dict[str, str]:
    """Return the fields of a dataclass with their annotations, inherited ones first; empty if it is not installed."""
    tree = _class(name)
    if tree is None:
        return {}
    fields: dict[str, str] = {}
    for base in tree.bases:
        if isinstance(base, ast.Name) and base.id in _FILES:
            fields |= fields_of(base.id)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if "ClassVar" not in annotation:
                fields[node.target.id] = annotation
    return fields


def _class(name: str) -> ast.ClassDef | None:
    package, path = _FILES[name]
    found = importlib.util.find_spec(package)  # a package that is not in a namespace: this does not import it
    file = Path(found.origin).parent / path if found and found.origin else None
    if file is None or not file.is_file():  # not installed, or another version: its own checks have to do
        return None
    return next((node for node in _tree(file).body if isinstance(node, ast.ClassDef) and node.name == name), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _fits(value: Any, annotation: str) -> bool:
    """Return whether a value has the annotated type; one of the library's own types is left to the library."""
    builtin = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}
    # Any other name is a type of the library.
    known: defaultdict[str, Any] = defaultdict(lambda: Any, builtin)
    known.update(Literal=Literal, Optional=Optional, Union=Union)
    try:
        TypeAdapter(eval(annotation, {"__builtins__": {}}, known)).validate_python(value)  # of installed code
    except ValidationError:
        return False
    return True
