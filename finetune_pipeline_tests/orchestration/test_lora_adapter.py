"""The asset lora_adapter: its settings, its preset, what it says while it trains."""

import json

import dagster as dg
import datasets
import pytest

from finetune_pipeline.orchestration.training_config import training_config
from finetune_pipeline.pipeline.incremental import write_subset
from finetune_pipeline.pipeline.train import describe_progress, settings_of_run
from finetune_pipeline.settings import load_loop
from finetune_pipeline.training.architecture import FAMILIES
from finetune_pipeline.training.job import Progress
from finetune_pipeline.training.presets import apply_preset
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events

LARGE = {
    "model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("data/no_such_model", "data/no_such_model of the base model data/no_such_model does not exist"),
        ("LARGE", "does not fit preset 8gb: with qlora, per_device_train_batch_size 1"),
    ],
)
def test_a_preset_that_cannot_be_filled_fails_its_own_training_alone(make_loop, instance, tmp_path, base, why):
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


def test_in_the_launchpad_what_the_preset_fills_is_empty_and_can_be_set_for_one_run(make_loop):
    loop = make_loop(training={"preset": "8gb", "lora_r": 4, "early_stopping_patience": 2})
    Config = training_config(loop)
    plain = Config()
    assert (plain.lora_r, plain.per_device_train_batch_size, plain.adapter, plain.num_train_epochs) == (
        4,
        None,
        None,
        3.0,
    )
    assert "preset 8gb fills it" in Config.model_fields["per_device_train_batch_size"].description
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


def test_one_line_says_how_far_a_training_is():
    progress = Progress(
        step=6, steps=24, epoch=0.75, loss=1.25, validation_loss=1.5, learning_rate=0.0002, tokens_per_second=12345.6,
        eta_seconds=83.4, elapsed_seconds=20, memory_bytes=3 * 2**29,
    )  # fmt: skip
    assert describe_progress(progress) == (
        "training 25%, step 6 of 24, epoch 0.8, loss 1.250, validation loss 1.500, learning rate 0.0002, "
        "12,346 tokens/s, 1.5 GiB, 1:23 left"
    )
    bare = progress.model_copy(update={"validation_loss": None, "memory_bytes": None})
    assert describe_progress(bare) == (
        "training 25%, step 6 of 24, epoch 0.8, loss 1.250, learning rate 0.0002, 12,346 tokens/s, 1:23 left"
    )


def test_a_part_of_a_dataset_has_these_rows_and_no_tokens_of_the_others(tmp_path):
    whole = tmp_path / "whole"
    splits = {
        "train": datasets.Dataset.from_dict({"prompt": [f"p{n}" for n in range(9)]}),
        "validation": datasets.Dataset.from_dict({"prompt": ["held out"]}),
    }
    datasets.DatasetDict(splits).save_to_disk(whole)
    (whole / ".tokenized" / "train-0").mkdir(parents=True)
    for rows in ((1, 4), (2, 5, 8)):  # the second time over what a killed training left
        part = datasets.load_from_disk(str(write_subset(whole, rows, tmp_path / "part")))
        assert part["train"]["prompt"][:] == [f"p{row}" for row in rows]
        assert part["validation"]["prompt"][:] == ["held out"]
    assert not (tmp_path / "part" / ".tokenized").exists()
