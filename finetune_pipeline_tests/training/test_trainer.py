"""Training in this process, on a tiny model."""

import json
import shutil
import sys
import time

import pytest
from peft import get_peft_model
from safetensors.torch import load_file

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.training import callbacks, tokenized_data
from finetune_pipeline.training import trainer as trainer_module
from finetune_pipeline.training.backends.axolotl_config import write
from finetune_pipeline.training.checkpoints import mark_complete
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.conversations import IGNORE_INDEX
from finetune_pipeline.training.job import CHECKPOINTS, TrainingError, TrainingResult, finished
from finetune_pipeline.training.model import load_model, lora_config
from finetune_pipeline.training.tokenized_data import load_data
from finetune_pipeline.training.trackers import set_tensorboard_folder
from finetune_pipeline.training.trainer import make_trainer, run_training

from .conftest import breaking_in_half, contrary, rows, save, weights, with_settings


def train_here(job):
    job.output.mkdir(parents=True, exist_ok=True)
    return run_training(job, time.monotonic())


def test_it_learns_and_leaves_an_adapter_and_a_result(job):
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
    assert config["base_model_name_or_path"] == "tiny"  # not a path of this machine
    lines = [json.loads(line) for line in (job.output / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == lines[-1]["steps"] == 24
    assert lines[-1]["seconds_left"] == 0


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_a_run_of_a_single_step_learns(job, warmup):
    result = train_here(
        with_settings(job, num_train_epochs=1, per_device_train_batch_size=64, save_steps=500, warmup_steps=warmup)
    )
    assert result.steps == 1 and result.loss_after < result.loss_before


def test_the_learning_rate_grows_during_the_warmup_steps(job):
    rates = [point.learning_rate for point in train_here(with_settings(job, warmup_steps=0.5)).curve]
    assert rates.index(max(rates)) == 12 and rates[0] == 0


def test_the_same_seed_gives_the_same_adapter(job, tmp_path):
    results = []
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        one = with_settings(job, seed=seed, num_train_epochs=1).model_copy(update={"output": tmp_path / name})
        train_here(one)
        results.append(weights(one))
    assert results[0] == results[1] != results[2]


def test_only_the_completion_has_labels(job):
    tokens = load_tokenizer(job.base_model)
    job.output.mkdir()
    trainer = make_trainer(job, job.settings, load_data(job, tokens), tokens, 24, False)
    row = trainer.train_dataset[0]
    labeled = tokens.decode([label for label in row["labels"] if label != IGNORE_INDEX])
    assert labeled.strip() == json.dumps({"thickness_mm": 100}) + "<|im_end|>"


def test_every_conversation_starts_with_the_system_prompt(job):
    tokens = load_tokenizer(job.base_model)
    data = load_data(job.model_copy(update={"system_prompt": "Answer in JSON."}), tokens)
    turns = [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "wall of 100 mm"},
        {"role": "assistant", "content": json.dumps({"thickness_mm": 100})},
    ]
    assert tokens.decode(data.train[0]["input_ids"]) == tokens.apply_chat_template(turns, tokenize=False)


def test_earlier_turns_are_tokenized_as_in_service(job, tmp_path):
    turns = [{"role": "user", "content": "a wall"}, {"role": "assistant", "content": "How thick?"}]
    row = {"prompt": "150 mm", "history": turns, "completion": "{}"}
    dataset = save(tmp_path / "d", [row])
    tokens = load_tokenizer(job.base_model)
    data = load_data(job.model_copy(update={"system_prompt": "Be short.", "dataset": dataset}), tokens)
    asked = [{"role": "system", "content": "Be short."}, *turns, {"role": "user", "content": "150 mm"}]
    served = tokens.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    (row,) = data.train
    assert tokens.decode(row["input_ids"][: row["labels"].count(IGNORE_INDEX)]) == served


def test_a_dataset_without_histories_is_refused(job, tmp_path):
    dataset = save(tmp_path / "d", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(TrainingError, match="lacks the column history; rebuild the dataset"):
        load_data(job.model_copy(update={"dataset": dataset}), load_tokenizer(job.base_model))


def test_longer_examples_are_left_out_and_counted(job, tmp_path):
    long = {"prompt": "wall " * 200, "history": [], "completion": "{}"}
    dataset = save(tmp_path / "d", [*rows(16), long], rows(4))
    data = load_data(job.model_copy(update={"dataset": dataset}), load_tokenizer(job.base_model))
    short = load_data(
        with_settings(job, max_length=64).model_copy(update={"dataset": dataset}), load_tokenizer(job.base_model)
    )
    assert (len(data.train), data.too_long) == (17, 0)
    assert (len(short.train), short.too_long) == (16, 1)


def test_a_dataset_of_too_long_examples_is_refused(job):
    with pytest.raises(TrainingError, match="64 of 64 examples have more than 16 tokens; raise max_length"):
        train_here(with_settings(job, max_length=16))


@pytest.mark.parametrize("weighted", [False, True])
def test_replay_data_and_too_long_examples_are_refused(job, tmp_path, weighted):
    long = [{**row, "prompt": "7" * 400, "reward": 1.0, "source": "logs"} for row in rows(4, 100)]
    dataset = save(tmp_path / "d", [*long, *({**row, "reward": None, "source": "replay"} for row in rows(6, 200))])
    one = with_settings(job, max_length=128, reward_weighted=weighted).model_copy(update={"dataset": dataset})
    message = (
        "nothing is left to train on: 4 of 10 examples have more than 128 tokens, and the other 6 are replay examples"
    )
    with pytest.raises(TrainingError, match=message):
        run_training(one, time.monotonic())
    with pytest.raises(TrainingError, match=message):
        write(one, None, gpu=False)


def test_without_validation_the_loss_is_measured_on_training_examples(job, tmp_path):
    dataset = save(tmp_path / "d", rows(16))
    data = load_data(job.model_copy(update={"dataset": dataset}), load_tokenizer(job.base_model))
    assert data.validation["input_ids"] == data.train["input_ids"]


@pytest.mark.parametrize(
    ("validation_rows", "stopping", "message"),
    [
        (8, None, "not validated, so the last weights are kept: all 8 validation examples have more than 128 tokens"),
        (8, 1, "early_stopping_patience does nothing: all 8 validation examples have more than 128"),
        (0, 1, "early_stopping_patience does nothing: the dataset has too few validation examples"),
        (0, None, ""),
    ],
)
def test_a_run_without_validation_is_logged(job, tmp_path, capsys, validation_rows, stopping, message):
    long = [{**row, "prompt": "7" * 400} for row in rows(validation_rows, 300)]
    one = with_settings(job, max_length=128, early_stopping_patience=stopping)
    one = one.model_copy(update={"dataset": save(tmp_path / "d", rows(8, 100), long)})
    assert not load_data(one, load_tokenizer(one.base_model)).has_validation
    logged = [line for line in capsys.readouterr().err.splitlines() if "validated" in line]
    assert len(logged) == bool(message) and message in "".join(logged)


def test_texts_are_tokenized_once_for_all_runs(job, tmp_path, monkeypatch):
    dataset = save(tmp_path / "d", rows(16), rows(4, 50))
    first = job.model_copy(update={"dataset": dataset})
    made = load_data(first, load_tokenizer(job.base_model))
    with monkeypatch.context() as patched:
        patched.setattr(tokenized_data, "tokenize_rows", None)  # another seed, another length, a retry
        again = load_data(with_settings(first, seed=5, max_length=500), load_tokenizer(job.base_model))
    assert again.train["input_ids"] == made.train["input_ids"]
    assert again.validation["labels"] == made.validation["labels"]
    other = load_data(first.model_copy(update={"system_prompt": "Be short."}), load_tokenizer(job.base_model))
    assert other.train[0]["length"] > made.train[0]["length"]
    save(dataset, rows(16, 500), rows(4, 50))
    changed = load_data(first, load_tokenizer(job.base_model))
    assert changed.train["input_ids"] != made.train["input_ids"]


def test_examples_are_tokenized_in_batches_and_memory_mapped(job, tmp_path, monkeypatch):
    job = job.model_copy(update={"dataset": save(tmp_path / "d", rows(40), rows(4, 50))})
    sizes, tokenize_rows = [], tokenized_data.tokenize_rows

    def counted(batch, *arguments):
        sizes.append(len(batch))
        return tokenize_rows(batch, *arguments)

    monkeypatch.setattr(tokenized_data, "tokenize_rows", counted)
    monkeypatch.setattr(tokenized_data, "_ROWS_PER_BATCH", 16)
    train = load_data(job, load_tokenizer(job.base_model)).train
    assert sizes == [16, 16, 8, 4]
    (cached,) = [file["filename"] for file in train.cache_files]
    assert cached.startswith(str(tmp_path / "d" / ".tokenized" / "train-"))


def test_tokens_are_kept_in_memory_if_the_dataset_is_read_only(job, tmp_path, monkeypatch):
    dataset = save(tmp_path / "d", rows(8), rows(4, 50))
    monkeypatch.setattr(tokenized_data.os, "access", lambda *_: False)
    train = load_data(job.model_copy(update={"dataset": dataset}), load_tokenizer(job.base_model)).train
    assert len(train) == 8 and train.cache_files == []
    assert not list((dataset / ".tokenized").glob("*"))


def test_unfinished_token_files_are_not_read(job, tmp_path):
    dataset = save(tmp_path / "d", rows(16), rows(4, 50))
    job = job.model_copy(update={"dataset": dataset})
    made = load_data(job, load_tokenizer(job.base_model))
    for folder in (dataset / ".tokenized").iterdir():
        folder.rename(folder.with_name("tmp-unfinished"))
    assert load_data(job, load_tokenizer(job.base_model)).train["input_ids"] == made.train["input_ids"]


def test_trained_embeddings_are_saved_in_the_adapter(job):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    token = load_tokenizer(job.base_model)("7", add_special_tokens=False)["input_ids"][-1]
    train_here(
        with_settings(job, trainable_token_indices=(token,), lora_target_modules=("q_proj",), num_train_epochs=1)
    )
    base = AutoModelForCausalLM.from_pretrained(job.base_model)
    before = base.get_input_embeddings().weight.detach().clone()
    merged = PeftModel.from_pretrained(base, job.output / "adapter").merge_and_unload()
    changed = (merged.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [token]
    assert torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)  # tied, as in the base
    config = json.loads((job.output / "adapter" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["trainable_token_indices"]) == (["q_proj"], [token])


def test_embeddings_are_trained_on_padded_batches(job, padded_base, tmp_path):
    padded = job.model_copy(update={"base_model": padded_base})
    token = load_tokenizer(padded_base)("7", add_special_tokens=False)["input_ids"][-1]
    result = train_here(with_settings(padded, trainable_token_indices=(token,)))
    plain = train_here(padded.model_copy(update={"output": tmp_path / "plain"}))
    assert result.loss_before == pytest.approx(plain.loss_before, rel=1e-5)
    assert result.loss_after < result.loss_before
    assert b"trainable_tokens_delta" in weights(job)


def test_all_embeddings_can_be_trained(job):
    train_here(with_settings(job, trainable_token_indices="all", num_train_epochs=1))
    config = json.loads((job.output / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == list(range(len(load_tokenizer(job.base_model))))


def test_an_unknown_token_is_refused(job):
    with pytest.raises(TrainingError, match="names 99999, but the base model's tokens have the ids 0 to"):
        train_here(with_settings(job, trainable_token_indices=(99999,)))


@pytest.mark.parametrize("name", ["foo", "input_layernorm"])
def test_an_unknown_target_module_is_refused_with_the_known_ones(job, name):
    has = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(
        TrainingError, match=f"lora_target_modules names {name}, but the layers .* are {has}; name some"
    ):
        train_here(with_settings(job, lora_target_modules=("q_proj", name)))


def test_a_missing_dataset_is_an_error(job, tmp_path):
    with pytest.raises(TrainingError, match="holds no saved DatasetDict"):
        train_here(job.model_copy(update={"dataset": tmp_path / "nothing"}))


def test_a_non_finite_loss_ends_the_run_without_a_result(job):
    with pytest.raises(TrainingError, match=r"diverged.*lower learning_rate"):
        train_here(with_settings(job, learning_rate=1e30))
    assert not (job.output / "result.json").exists()


@pytest.mark.slow
def test_qlora_trains_over_four_bit_weights(job):
    result = train_here(with_settings(job, adapter="qlora"))
    assert result.adapter == "qlora"
    assert result.loss_after < result.loss_before * 0.95


def test_the_weights_with_the_lowest_validation_loss_are_kept(job, tmp_path):
    result = train_here(contrary(with_settings(job, num_train_epochs=16, save_steps=0.125), tmp_path))
    losses = {point.step: point.loss for point in result.validation}
    assert list(losses) == list(range(8, 65, 8))
    assert result.best_step == min(losses, key=losses.__getitem__) < 64
    assert result.loss_after == pytest.approx(losses[result.best_step], rel=1e-5)
    assert not (job.output / "checkpoints").exists()


def test_only_the_best_and_the_newest_checkpoints_are_kept(job, monkeypatch):
    counts = []

    def mark(checkpoint, key):
        counts.append(len(list(checkpoint.parent.glob("checkpoint-*"))))
        mark_complete(checkpoint, key)

    monkeypatch.setattr(callbacks, "mark_complete", mark)
    train_here(with_settings(job, save_steps=0.125))
    assert len(counts) == 8
    assert max(counts) == 3


def test_it_stops_when_the_validation_loss_no_longer_falls(job, tmp_path):
    result = train_here(
        contrary(with_settings(job, num_train_epochs=40, save_steps=0.05, early_stopping_patience=2), tmp_path)
    )
    losses = [point.loss for point in result.validation]
    assert result.stopped_early and result.steps < 160
    assert len(losses) - 1 - losses.index(min(losses)) == 2


def train_until_the_result(job, monkeypatch):
    """Train, and be killed after the last checkpoint and before the result."""
    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "_load_best", lambda _: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            train_here(job)


def train_interrupted(job, monkeypatch):
    """Train, be interrupted in the middle of the second epoch, and resume."""
    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "ProgressCallback", breaking_in_half(trainer_module.ProgressCallback))
        with pytest.raises(KeyboardInterrupt):
            train_here(job)
    return train_here(job)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_a_run_interrupted_within_an_epoch_resumes_to_the_same_weights(job, padded_base, padded, tmp_path, monkeypatch):
    whole = with_settings(job, save_steps=1 / 6)
    if padded:
        whole = whole.model_copy(update={"base_model": padded_base})
    train_here(whole)
    broken = whole.model_copy(update={"output": tmp_path / "broken"})
    assert train_interrupted(broken, monkeypatch).resumed_from == 12
    assert weights(broken) == weights(whole)


def test_an_interrupted_qlora_resumes_to_the_same_weights(job, tmp_path, monkeypatch):
    whole = with_settings(job, adapter="qlora", save_steps=1 / 6)
    train_here(whole)
    broken = whole.model_copy(update={"output": tmp_path / "broken"})
    train_interrupted(broken, monkeypatch)
    assert weights(broken) == weights(whole)
    assert {str(w.dtype) for w in load_file(whole.output / "adapter" / "adapter_model.safetensors").values()} == {
        "torch.float32"
    }


def test_a_run_killed_after_early_stopping_does_not_continue(job, tmp_path, monkeypatch):
    stopping = contrary(with_settings(job, num_train_epochs=40, save_steps=0.05, early_stopping_patience=2), tmp_path)
    uninterrupted = train_here(stopping)
    killed = stopping.model_copy(update={"output": tmp_path / "killed"})
    train_until_the_result(killed, monkeypatch)
    result = train_here(killed)
    assert result.resumed_from == result.steps == uninterrupted.steps < 160
    assert (result.validation, result.best_step, result.stopped_early) == (
        uninterrupted.validation,
        uninterrupted.best_step,
        True,
    )
    assert weights(killed) == weights(stopping)


def test_a_run_killed_after_its_last_step_takes_no_further_one(job, tmp_path, monkeypatch):
    part = with_settings(job, num_train_epochs=1.5)  # it ends within an epoch
    uninterrupted = train_here(part)
    killed = part.model_copy(update={"output": tmp_path / "killed"})
    train_until_the_result(killed, monkeypatch)
    result = train_here(killed)
    assert result.resumed_from == result.steps == uninterrupted.steps == 12
    assert weights(killed) == weights(part)


def test_a_run_killed_while_removing_checkpoints_is_done(job, monkeypatch):
    def kill(folder, *_, **__):
        if folder == job.output / CHECKPOINTS:
            sys.exit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", kill)
        with pytest.raises(SystemExit, match="killed"):
            train_here(job)
    result = finished(job)
    assert result is not None and (job.output / CHECKPOINTS).exists()
    assert train(job) == result
    assert not (job.output / CHECKPOINTS).exists()


@pytest.mark.parametrize("best_is_there", [True, False])
def test_the_best_weights_are_found_in_a_moved_folder(job, tmp_path, monkeypatch, best_is_there):
    job = contrary(with_settings(job, num_train_epochs=16, save_steps=0.125), tmp_path)
    train_until_the_result(job, monkeypatch)
    moved = job.model_copy(update={"output": tmp_path / "moved"})
    job.output.rename(moved.output)
    checkpoints = moved.output / "checkpoints"
    best = json.loads((checkpoints / "checkpoint-64" / "trainer_state.json").read_text())["best_global_step"]
    if not best_is_there:
        shutil.rmtree(checkpoints / f"checkpoint-{best}")
    result = train_here(moved)
    losses = {point.step: point.loss for point in result.validation}
    assert best == min(losses, key=losses.__getitem__) < result.resumed_from == 64
    assert result.best_step == (best if best_is_there else 64)
    assert result.loss_after == pytest.approx(losses[result.best_step], rel=1e-5)


def test_without_a_validation_set_the_last_weights_are_kept(job, tmp_path):
    result = train_here(job.model_copy(update={"dataset": save(tmp_path / "d", rows(16))}))
    assert (result.validation, result.best_step, result.stopped_early) == ((), result.steps, False)


def test_training_is_warm_started_from_an_adapter(job, tmp_path):
    first = train_here(job)
    further = job.model_copy(update={"output": tmp_path / "further", "initial_adapter": job.output / "adapter"})
    second = train_here(further)
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-4)
    assert weights(further) != weights(job)


def test_progress_has_memory_and_validation_loss(job):
    train_here(job)
    last = json.loads((job.output / "progress.jsonl").read_text().splitlines()[-1])
    assert 50e6 < last["memory_bytes"] < 8e9
    assert last["validation_loss"] > 0


def test_non_finite_weights_never_become_a_checkpoint(job):
    with pytest.raises(TrainingError, match="diverged"):
        train_here(with_settings(job, learning_rate=1e30, save_steps=1 / 24))
    whole = list((job.output / "checkpoints").glob("checkpoint-*/complete.json"))
    assert len(whole) <= 2  # of 24: the first steps, before the first update with such a rate
    for marker in whole:
        assert all(w.isfinite().all() for w in load_file(marker.parent / "adapter_model.safetensors").values())


def test_it_reports_to_tensorboard(job, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # has pytest remove what is set below
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    set_tensorboard_folder(job.output)
    train_here(with_settings(job, report_to=("tensorboard",)))
    [file] = (job.output / "tensorboard").rglob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes()


def test_a_missing_tracker_is_named_before_anything_starts(job):
    with pytest.raises(TrainingError, match="names wandb, which is not installed; pip install wandb"):
        train(with_settings(job, report_to=("wandb",)))
    assert not job.output.exists()


def test_evaluation_does_not_change_gradients_over_4_bit_weights(job):
    import torch

    base = load_model(with_settings(job, adapter="qlora"), False)
    model = get_peft_model(base, lora_config(job.settings, base))
    ids = torch.arange(40, 104).reshape(2, 32)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    model.train()
    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))
