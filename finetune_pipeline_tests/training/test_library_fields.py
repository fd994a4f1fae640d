"""Fields of TRL's and PEFT's configurations that are passed through: checked early, and trained with."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import pytest
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from trl import DPOConfig, KTOConfig, SFTConfig, SFTTrainer

from finetune_pipeline import trainer_fields
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.tokenized_data import load_data
from finetune_pipeline.training.trainer import make_trainer, run_training

from .conftest import with_settings
from .test_preference import prefer, trainer_of  # noqa: F401  # a fixture

CONFIGS = [SFTConfig, DPOConfig, KTOConfig, LoraConfig]


DIFFERENTLY_NAMED = {"r": "lora_r", "target_modules": "lora_target_modules"}


def test_every_default_that_differs_from_the_library_is_documented():
    table = (PROJECT_ROOT / "docs" / "reference" / "training-defaults.md").read_text()
    ours = TrainingSettings()
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            name = DIFFERENTLY_NAMED.get(field.name, field.name)
            if not hasattr(ours, name) or field.default is dataclasses.MISSING or name == "loss_type":
                continue
            default, library = getattr(ours, name), field.default
            nothing = (None, "none", False, 0, (), {})  # these mean the same
            if default != library and not (default in nothing and library in nothing):
                assert f"`{name}`" in table, f"{config.__name__}.{field.name}: {library!r} there, {default!r} here"


def settings_with(**changes):
    return TrainingSettings.model_validate(changes)


@pytest.mark.parametrize("config", CONFIGS)
def test_fields_read_from_source_are_those_of_the_class(config):
    assert set(trainer_fields.fields_of(config.__name__)) == {field.name for field in dataclasses.fields(config)}


def test_every_reserved_field_exists():
    trainer = {field.name for config in CONFIGS[:3] for field in dataclasses.fields(config)}
    assert trainer_fields.RESERVED.keys() <= trainer
    assert trainer_fields.RESERVED_LORA.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_checking_fields_imports_no_library():
    code = (
        "import sys; from finetune_pipeline.settings import TrainingSettings;"
        "TrainingSettings(trainer_config={'max_grad_norm': 0.5}, lora_config={'bias': 'none'}, optim='adafactor');"
        "print({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer_config": {"neftune_noise": 5}},
            "SFTConfig has no field neftune_noise; did you mean neftune_noise_alpha",
        ),
        ({"trainer_config": {"neftune_noise_alpha": "five"}}, r"neftune_noise_alpha is 'five', and SFTConfig expects"),
        ({"lora_config": {"rank_pattern": [1]}}, r"rank_pattern is \[1\], and LoraConfig expects Optional\[dict\]"),
        ({"lora_config": {"layers_to_transform": "first"}}, "layers_to_transform is 'first', and LoraConfig expects"),
        (
            {"trainer_config": {"output_dir": "x"}},
            "output_dir cannot be set here: every training run has its own folder",
        ),
        ({"trainer_config": {"learning_rate": 1.0}}, r"set training\.learning_rate"),
        ({"trainer_config": {"eval_steps": 10}}, r"validation runs whenever .* set training\.save_steps"),
        ({"method": "dpo", "trainer_config": {"desirable_weight": 2.0}}, "DPOConfig has no field desirable_weight"),
        (
            {"method": "auto", "trainer_config": {"ld_alpha": 0.5}},
            "auto needs a field that every method has; DPOConfig has it: set method: dpo",
        ),
        ({"lora_config": {"lora_bia": True}}, "LoraConfig has no field lora_bia; did you mean lora_bias"),
        ({"lora_config": {"r": 8}}, r"set training\.lora_r"),
        ({"lora_config": {"init_lora_weights": "pissa"}}, "pissa.* changes the base weights"),
        ({"lora_config": {"modules_to_save": ["lm_head"]}}, "fully trained modules are not exported"),
        ({"lr_scheduler_type": "cosin"}, r"transformers has no learning-rate schedule 'cosin'; did you mean cosine\?"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "cannot depend on the validation loss"),
        ({"optim": "adamw_torch_fuse"}, r"transformers has no optimizer .*; did you mean adamw_torch_fused\?"),
        ({"optim": "adamw"}, r"transformers has no optimizer 'adamw'; did you mean adamw_torch\?"),
        ({"trainer_config": {"desirable_weight": 2.0}}, "SFTConfig has no field .*; KTOConfig has it: set method: kto"),
        ({"method": "dpo", "loss_type": ["sigmod"]}, r"TRL's dpo has no loss 'sigmod'; did you mean sigmoid\?"),
        ({"method": "kto", "loss_type": "apo_zero"}, r"did you mean apo_zero_unpaired\?"),
        ({"method": "kto", "loss_type": "sigmoid"}, "TRL's kto has no loss 'sigmoid'; it has apo_zero_unpaired, kto"),
        ({"method": "kto", "loss_type": ["kto", "kto"]}, "kto cannot use 2 losses; name one"),
        ({"loss_type": "sigmoid"}, "the loss of sft is cross-entropy .*; leave loss_type out, or set method: dpo"),
        ({"method": "auto", "loss_type": "kto"}, "method: auto may choose sft"),
        ({"loss_weights": [1.0, 1.0]}, "loss_weights weighs the losses of method dpo, and method is sft"),
        ({"trainer_config": {"loss_type": "kto"}}, "set training.loss_type for dpo or kto"),
        ({"save_steps": 1.5}, "a fraction of all steps .* or a whole number"),
        ({"method": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "give each loss a weight"),
    ],
)
def test_unusable_fields_are_rejected_with_a_remedy(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings_with(**changes)


def trained_with(job, **changes):
    """Train for a few steps; return the trainer's arguments and the adapter's configuration."""
    changed = with_settings(job, **settings_with(**changes).model_dump(include=changes.keys()))
    job.output.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(changed.base_model)
    trainer = make_trainer(changed, changed.settings, load_data(changed, tokenizer), tokenizer, 24, False)
    result = run_training(changed, time.monotonic())
    config = json.loads((changed.output / "adapter" / "adapter_config.json").read_text())
    return trainer, result, config


def test_fields_of_sft_config_reach_the_trainer(job):
    passed = {"neftune_noise_alpha": 5.0, "max_grad_norm": 0.5, "adam_beta2": 0.95, "max_steps": 6}
    passed["lr_scheduler_kwargs"] = {"min_lr_rate": 0.5}
    trainer, result, _ = trained_with(
        job, trainer_config=passed, lr_scheduler_type="cosine_with_min_lr", optim="adafactor", logging_steps=2
    )
    args = trainer.args
    assert {name: getattr(args, name) for name in passed} == passed
    assert (args.lr_scheduler_type, args.optim, args.logging_steps) == ("cosine_with_min_lr", "adafactor", 2)
    assert type(trainer) is SFTTrainer  # NEFTune scales its noise by the length of a row, so rows are not packed
    assert result.steps == 6
    assert [point.step for point in result.curve] == [2, 4, 6]
    assert result.curve[-1].learning_rate >= 0.5 * job.settings.learning_rate


@pytest.mark.parametrize("name", ["use_rslora", "use_dora"])
def test_lora_variants_reach_the_adapter(job, name):
    passed = {"layers_to_transform": [1], "init_lora_weights": "gaussian"}
    trainer, result, config = trained_with(
        job, num_train_epochs=1, lora_target_modules=("q_proj",), lora_config=passed, **{name: True}
    )
    assert config[name] is True
    assert config["layers_to_transform"] == [1]
    assert trainer.model.peft_config["default"].init_lora_weights == "gaussian"
    assert result.loss_after < result.loss_before
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job.base_model)
    adapted = PeftModel.from_pretrained(base, job.output / "adapter")
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names and all(".layers.1." in name for name in names)
    scaling = {
        module.scaling["default"] for module in adapted.modules() if isinstance(getattr(module, "scaling", 0), dict)
    }
    assert scaling == {8 / 4**0.5 if name == "use_rslora" else 8 / 4}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_implementation_is_used_over_padded_batches(job, attention):
    trainer, result, _ = trained_with(job, num_train_epochs=1, attn_implementation=attention)
    assert type(trainer) is SFTTrainer
    assert trainer.model.config._attn_implementation == attention
    assert result.loss_after < result.loss_before


def test_flash_attention_without_its_package_is_an_error(job):
    with pytest.raises(TrainingError, match=r"attn_implementation flash_attention_2 cannot be used: .*leave it out"):
        trained_with(job, attn_implementation="flash_attention_2")


def test_steps_as_whole_numbers_are_validated_at(job):
    _, result, _ = trained_with(job, save_steps=10, warmup_steps=3)
    assert [point.step for point in result.validation] == [10, 20, 24]
    rates = [point.learning_rate for point in result.curve]
    assert rates.index(max(rates)) == 3


def test_checkpoints_every_500_steps_leave_one_at_the_end(job):
    _, result, _ = trained_with(job, save_steps=500)
    assert [point.step for point in result.validation] == [result.steps] == [24]


@pytest.mark.parametrize(
    ("method", "passed"),
    [("dpo", {"label_smoothing": 0.1, "max_grad_norm": 0.5}), ("kto", {"undesirable_weight": 3.0})],
)
def test_fields_of_the_methods_config_reach_its_trainer(prefer, method, passed):  # noqa: F811
    job = prefer(method, trainer_config=passed, num_train_epochs=1)
    trainer, _ = trainer_of(job)
    assert {name: getattr(trainer.args, name) for name in passed} == passed
    assert run_training(job, time.monotonic()).steps > 0


def test_what_trl_rejects_is_an_error_that_names_it(prefer):  # noqa: F811
    with pytest.raises(TrainingError, match=r"cannot start with trainer_config {'sync_ref_model': True}: .*change or"):
        trainer_of(prefer("dpo", trainer_config={"sync_ref_model": True}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr"),
        ({"trainer_config": {"activation_offloading": True}}, "trainer_config {'activation_offloading': True}"),
        ({"method": "dpo", "trainer_config": {"use_weighting": True}}, "trainer_config {'use_weighting': True}"),
        ({"lora_config": {"target_parameters": ["no.such"]}}, "target_parameters names no.such"),
    ],
)
def test_a_value_that_fails_at_the_first_step_is_named(job, prefer, changes, named):  # noqa: F811
    job.output.mkdir(exist_ok=True)
    passed = {name: value for name, value in changes.items() if name != "method"}
    chosen = prefer("dpo", **passed) if "method" in changes else with_settings(job, **passed)
    with pytest.raises(TrainingError, match=re.escape(named)):
        run_training(chosen, time.monotonic())


def test_padding_to_a_multiple_trains_on_padded_batches(job):
    trainer, result, _ = trained_with(job, num_train_epochs=1, trainer_config={"pad_to_multiple_of": 64})
    assert type(trainer) is SFTTrainer
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 64 == 0
    assert result.loss_after < result.loss_before
