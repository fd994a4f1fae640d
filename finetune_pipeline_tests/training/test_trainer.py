"""The training itself, in this process, on a tiny model."""

import json
import time

import pytest

from finetune_pipeline.training.data import load, tokenizer
from finetune_pipeline.training.job import TrainingError, TrainingResult, finished
from finetune_pipeline.training.trainer import _trainer, run_training

from .conftest import rows, save, with_settings


def train_here(job):
    job.output.mkdir(parents=True, exist_ok=True)
    return run_training(job, time.monotonic())


def adapter(job):
    return (job.output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_learns_leaves_an_adapter_and_says_what_it_did(job):
    result = train_here(job)
    files = {str(path.relative_to(job.output)) for path in job.output.rglob("*") if path.is_file()}
    assert files == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "progress.jsonl",
        "result.json",
    }
    assert TrainingResult.model_validate_json((job.output / "result.json").read_bytes()) == result == finished(job)
    assert result.loss_after < result.loss_before * 0.95
    assert (result.steps, result.examples, result.too_long, result.resumed_from) == (24, 64, 0, 0)
    assert [point.step for point in result.curve] == list(range(1, 25))
    assert result.tokens_per_second > 0
    assert 50e6 < result.peak_memory_bytes < 8e9
    config = json.loads((job.output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"  # no path of this machine
    lines = [json.loads(line) for line in (job.output / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == lines[-1]["steps"] == 24
    assert lines[-1]["eta_seconds"] == 0


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(job, tmp_path):
    results = []
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        one = with_settings(job, seed=seed, epochs=1).model_copy(update={"output": tmp_path / name})
        train_here(one)
        results.append(adapter(one))
    assert results[0] == results[1] != results[2]


def test_the_loss_counts_the_answer_only(job):
    tokens = tokenizer(job.base_model)
    job.output.mkdir()
    trainer = _trainer(job, job.settings, load(job, tokens), tokens, 24, False)
    row = trainer.train_dataset[0]
    learnt = tokens.decode([label for label in row["labels"] if label != -100])
    assert learnt.strip() == json.dumps({"thickness_mm": 100}) + "<|im_end|>"


def test_the_system_prompt_stands_before_every_prompt(job):
    tokens = tokenizer(job.base_model)
    data = load(job.model_copy(update={"system_prompt": "Answer in JSON."}), tokens)
    assert [message["role"] for message in data.train[0]["prompt"]] == ["system", "user"]


def test_what_was_said_before_the_prompt_is_trained_on_as_it_is_served(job, tmp_path):
    turns = [{"role": "user", "content": "a wall"}, {"role": "assistant", "content": "How thick?"}]
    row = {"prompt": "150 mm", "history": turns, "completion": "{}"}
    dataset = save(tmp_path / "d", [row])
    data = load(job.model_copy(update={"system_prompt": "Be short.", "dataset": dataset}), tokenizer(job.base_model))
    (prompt,) = data.train["prompt"]
    assert prompt == [{"role": "system", "content": "Be short."}, *turns, {"role": "user", "content": "150 mm"}]


def test_a_conversation_of_a_file_without_histories_is_refused(job, tmp_path):
    dataset = save(tmp_path / "d", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(TrainingError, match="lacks the column history; make the dataset again"):
        load(job.model_copy(update={"dataset": dataset}), tokenizer(job.base_model))


def test_longer_examples_are_left_out_and_counted(job, tmp_path):
    long = {"prompt": "wall " * 200, "history": [], "completion": "{}"}
    dataset = save(tmp_path / "d", [*rows(16), long], rows(4))
    data = load(job.model_copy(update={"dataset": dataset}), tokenizer(job.base_model))
    short = load(with_settings(job, max_length=64).model_copy(update={"dataset": dataset}), tokenizer(job.base_model))
    assert (len(data.train), data.too_long) == (17, 0)
    assert (len(short.train), short.too_long) == (16, 1)


def test_when_every_example_is_too_long_the_error_says_so(job):
    with pytest.raises(TrainingError, match="64 of 64 examples have more than 16 tokens; raise max_length"):
        train_here(with_settings(job, max_length=16))


def test_without_validation_the_loss_is_measured_on_the_training_examples(job, tmp_path):
    dataset = save(tmp_path / "d", rows(16))
    data = load(job.model_copy(update={"dataset": dataset}), tokenizer(job.base_model))
    assert data.measure["completion"] == data.train["completion"]


def test_a_dataset_that_is_not_there_is_an_error_that_says_so(job, tmp_path):
    with pytest.raises(TrainingError, match="holds no saved DatasetDict"):
        train_here(job.model_copy(update={"dataset": tmp_path / "nothing"}))


def test_a_loss_that_is_no_number_ends_the_training_and_leaves_no_result(job):
    with pytest.raises(TrainingError, match=r"diverged.*lower learning_rate"):
        train_here(with_settings(job, learning_rate=1e30))
    assert not (job.output / "result.json").exists()


@pytest.mark.slow
def test_qlora_trains_over_four_bit_weights(job):
    result = train_here(with_settings(job, adapter="qlora"))
    assert result.adapter == "qlora"
    assert result.loss_after < result.loss_before * 0.95
