"""Training an adapter: method, preset, progress, and what the manifest records."""

import json

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline import build_dataset, train
from finetune_pipeline.pipeline.lineage import made_with
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.train import (
    describe_progress,
    left_to_auto,
    settings_of_run,
    train_adapter,
    training_of,
    with_chosen,
)
from finetune_pipeline.training.auto_settings import CHOSEN, choose_replay, choose_settings
from finetune_pipeline.training.job import Progress, TrainingError
from finetune_pipeline_tests.conftest import feedback, interaction, uid

from .conftest import corrected

GOOD = [f"good {n}" for n in range(8)]
BAD = [f"bad {n}" for n in range(20)]


def dataset(loop, good=GOOD, bad=BAD):
    disliked = [[interaction(name), feedback(f"on {name}", name, "thumbs_down")] for name in bad]
    database = connect()
    with database.write() as connection:
        record(connection, loop.name, [*corrected(good), *(e for pair in disliked for e in pair)], default_reward)
    return build_dataset.build_dataset(loop, snapshot(loop, database)[0])


def checked(loop, artifact):
    return {check.name: check for check in build_dataset.check_dataset(loop, artifact)}


def test_undesirable_answers_count_for_kto_and_are_found_by_lineage(make_loop):
    loop = make_loop(training={"method": "auto"}, curation={"min_examples": 20, "validation_fraction": 0.2})
    artifact = dataset(loop)
    held = artifact.manifest
    assert held.preference_pairs == held.desirable == held.train
    assert held.train + held.validation == 8
    assert held.undesirable > held.train
    checks = checked(loop, artifact)
    assert all(check.passed for check in checks.values())
    assert checks["enough_examples"].metadata["examples"] == 8 + 8 + 20  # both answers of a correction
    sft = make_loop(training={"method": "sft"}, curation=loop.curation.model_dump())
    assert not checked(sft, artifact)["enough_examples"].passed
    assert made_with(connect(), loop, [str(uid("bad 3"))]).datasets == (artifact.path,)


@pytest.mark.slow
def test_auto_chooses_a_method_and_records_the_reason(make_loop):
    loop = make_loop(training={"method": "auto", "num_train_epochs": 1, "max_length": 128})
    held = dataset(loop, good=GOOD[:5])
    logged = []
    made = train_adapter(loop, loop.training, held, "run", lambda _: None, logged.append)
    manifest = made.manifest
    assert manifest.method == "kto"
    assert manifest.method_reason.startswith(
        "method kto (chosen by auto); 5 desirable completions (5 of them corrections) and 2"
    )
    assert logged[0] == f"full training, from the base model on all examples; {manifest.method_reason}"
    assert training_of(manifest, "run").method == "kto, lora"
    by_hand = loop.training.model_copy(update={"method": "kto"})
    again = train_adapter(loop, by_hand, held, "run", lambda _: None, logged.append).manifest
    assert (again.version, again.created_at) == (manifest.version, manifest.created_at)  # reused, not trained again
    assert again.method_reason == manifest.method_reason


def test_a_method_without_data_fails_before_loading_anything(make_loop):
    loop = make_loop(training={"method": "dpo"})
    held = dataset(loop, good=[], bad=BAD)
    with pytest.raises(TrainingError, match=r"dpo needs corrections .*dataset has 0 desirable completions"):
        train_adapter(loop, loop.training, held, "run", lambda _: None, lambda _: None)


def test_the_preset_is_applied_to_the_method_that_auto_chose(make_loop, monkeypatch):
    loop = make_loop(training={"method": "auto", "preset": "cpu"})
    filled = []
    monkeypatch.setattr(train, "apply_preset", lambda settings, _: filled.append(settings) or settings)

    def stop(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(train, "get_or_create", stop)
    with pytest.raises(InterruptedError):
        train_adapter(loop, loop.training, dataset(loop, good=GOOD[:5]), "run", lambda _: None, lambda _: None)
    assert [settings.method for settings in filled] == ["kto"]


def test_training_progress_is_one_line():
    progress = Progress(
        step=6, steps=24, epoch=0.75, loss=1.25, validation_loss=1.5, learning_rate=0.0002, tokens_per_second=12345.6,
        seconds_left=83.4, elapsed_seconds=20, memory_bytes=3 * 2**29,
    )  # fmt: skip
    assert describe_progress(progress) == (
        "training 25%, step 6 of 24, epoch 0.8, loss 1.250, validation loss 1.500, learning rate 0.0002, "
        "12,346 tokens/s, 1.5 GiB, 1:23 left"
    )
    bare = progress.model_copy(update={"validation_loss": None, "memory_bytes": None})
    assert describe_progress(bare) == (
        "training 25%, step 6 of 24, epoch 0.8, loss 1.250, learning rate 0.0002, 12,346 tokens/s, 1:23 left"
    )


@pytest.mark.slow
def test_auto_chooses_settings_and_replay_and_records_the_reasons(make_loop, tmp_path):
    rows = [{"prompt": f"old {number}", "completion": "yes"} for number in range(60)]
    (tmp_path / "replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curation = {"min_examples": 1, "validation_fraction": 0.0, "replay": str(tmp_path / "replay.jsonl")}
    training = {"auto": True, "num_train_epochs": 1, "max_length": 128, "load_best_model_at_end": True}
    loop = make_loop(training=training, curation=curation)
    held = dataset(loop, bad=())
    ratio, why = choose_replay(held.manifest.desirable)
    assert held.manifest.replayed == round(ratio * held.manifest.desirable) and held.manifest.replay_reason == why
    assert "replay" in (held.path / "card.md").read_text()
    logged = []
    manifest = train_adapter(loop, loop.training, held, "run", lambda _: None, logged.append).manifest
    assert manifest.settings["learning_rate"] == choose_settings(held.manifest.desirable, 3_370_000).learning_rate
    assert manifest.settings["num_train_epochs"] == 1  # as it is set
    assert manifest.settings_reason in logged
    assert manifest.settings_reason.startswith("learning_rate 0.002, chosen by auto for ")
    assert "num_train_epochs" not in manifest.settings_reason.partition(", chosen")[0]


def test_auto_leaves_alone_what_is_set(make_loop):
    curation = {"replay": None, "replay_ratio": 0.5}
    for training in ({}, {"auto": False}):
        settings, why = with_chosen(make_loop(training=training, curation=curation).training, "missing", 10)
        assert (settings.learning_rate, why) == (2e-4, "")
    fixed = {"learning_rate": 1e-3, "num_train_epochs": 2, "load_best_model_at_end": True}
    both = make_loop(training={"auto": True, **fixed}, curation=curation)
    assert with_chosen(both.training, "missing", 10)[1] == "" and not build_dataset.replay_is_chosen(both)
    kto, why = with_chosen(make_loop(training={"auto": True, "method": "kto"}).training, "missing", 10)
    assert kto.num_train_epochs == 3 and why.startswith("auto chooses nothing for kto")


def test_auto_needs_the_size_of_the_base_model(make_loop):
    loop = make_loop(training={"auto": True, "learning_rate": 1e-3, "load_best_model_at_end": True})
    with pytest.raises(
        TrainingError, match=r"training: auto has to know .* set training\.num_train_epochs: nobody/none"
    ):
        with_chosen(loop.training, "nobody/none", 10)


def test_auto_stands_alone_or_among_other_settings(make_loop):
    assert make_loop(training="auto").training == make_loop(training={"auto": True}).training
    assert left_to_auto(make_loop(training="auto")) == {*CHOSEN}
    assert left_to_auto(make_loop(training={"auto": True, "learning_rate": 1e-3})) == {*CHOSEN} - {"learning_rate"}
    loop = make_loop(training="auto")
    given = {**loop.training.model_dump(), **dict.fromkeys(CHOSEN), "seed": 3}
    settings = settings_of_run(loop, given)  # as the launchpad gives them
    chosen, why = with_chosen(settings, loop.base_model, 50)
    assert chosen.num_train_epochs == choose_settings(50, 3_370_000).num_train_epochs and chosen.seed == 3 and why
    assert not chosen.load_best_model_at_end and "load_best_model_at_end false" in why
