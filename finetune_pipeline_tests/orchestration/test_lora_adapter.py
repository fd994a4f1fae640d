"""The asset lora_adapter: its launchpad settings and its preset."""

import json

import dagster as dg
import pytest

from finetune_pipeline.orchestration.training_config import training_config
from finetune_pipeline.pipeline.train import settings_of_run
from finetune_pipeline.settings import load_loop
from finetune_pipeline.training.architecture import FAMILIES
from finetune_pipeline.training.presets import apply_preset
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events

LARGE = {
    "model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("data/no_such_model", "data/no_such_model does not exist"),
        ("LARGE", "does not fit preset 8gb: with qlora, per_device_train_batch_size 1"),
    ],
)
def test_a_preset_that_does_not_fit_fails_only_its_own_loop(make_loop, instance, tmp_path, base, why):
    if base == "LARGE":
        base = str(tmp_path / "large")
        (tmp_path / "large").mkdir()
        (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    loop = make_loop(base_model=base, training={"preset": "8gb"})
    both = dg.Definitions.merge(definitions(loop), definitions(load_loop("aec_parser")))
    dg.Definitions.validate_loadable(both)
    write_events(loop.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(12)))
    keys = [dg.AssetKey(["notes", stage]) for stage in ("raw_logs", "curated_dataset", "lora_adapter")]
    job = both.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)
    [failed] = [event for event in result.all_events if event.is_step_failure]
    assert failed.step_key == "notes__lora_adapter"
    assert why in failed.step_failure_data.error.to_string()


def test_the_launchpad_leaves_preset_settings_empty(make_loop):
    loop = make_loop(training={"preset": "8gb", "lora_r": 4, "early_stopping_patience": 2})
    Config = training_config(loop)
    plain = Config()
    assert (plain.lora_r, plain.per_device_train_batch_size, plain.adapter, plain.num_train_epochs) == (
        4,
        None,
        None,
        3.0,
    )
    assert "preset 8gb sets it" in Config.model_fields["per_device_train_batch_size"].description
    filled = apply_preset(settings_of_run(loop, plain.model_dump()), FAMILIES["Mistral-7B"])
    assert filled == apply_preset(loop.training, FAMILIES["Mistral-7B"])
    once = Config(per_device_train_batch_size=2, early_stopping_patience=None)
    changed = apply_preset(settings_of_run(loop, once.model_dump()), FAMILIES["Mistral-7B"])
    assert (
        changed.per_device_train_batch_size,
        changed.gradient_accumulation_steps,
        changed.early_stopping_patience,
    ) == (2, 8, None)
    without = make_loop(training={"num_train_epochs": 4})
    assert settings_of_run(without, training_config(without)(seed=9).model_dump()).seed == 9
