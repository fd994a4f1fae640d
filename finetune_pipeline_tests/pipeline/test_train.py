"""The method of a training, from the feedback in the store to the adapter's manifest."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline import build_dataset, train
from finetune_pipeline.pipeline.lineage import made_with
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.train import train_adapter, training_job
from finetune_pipeline.training.job import TrainingError
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


def test_the_dataset_says_what_it_holds_and_what_was_disliked_is_found_again_and_forgotten(make_loop):
    loop = make_loop(training={"method": "auto"}, curation={"min_examples": 20, "validation_fraction": 0.2})
    artifact = dataset(loop)
    held = artifact.manifest
    assert held.preference_pairs == held.desirable == held.train
    assert held.train + held.validation == 8
    assert held.undesirable > held.train
    checks = checked(loop, artifact)
    assert all(check.passed for check in checks.values())
    assert checks["enough_examples"].metadata["examples"] == 8 + 8 + 20  # of the corrections, both answers
    sft = make_loop(training={"method": "sft"}, curation=loop.curation.model_dump())
    assert not checked(sft, artifact)["enough_examples"].passed
    assert made_with(connect(), loop, [str(uid("bad 3"))]).datasets == (artifact.path,)


@pytest.mark.slow
def test_auto_is_resolved_before_the_training_and_the_adapter_says_why(make_loop):
    loop = make_loop(training={"method": "auto", "num_train_epochs": 1, "max_length": 128})
    held = dataset(loop, good=GOOD[:5])
    told = []
    made = train_adapter(loop, loop.training, held, "run", lambda _: None, told.append)
    manifest = made.manifest
    assert manifest.method == "kto"
    assert manifest.method_reason.startswith("kto: 5 answers found good (5 of them corrections) and 2")
    assert told[0] == f"full training, from the base model on all examples; by {manifest.method_reason}"
    assert training_job(manifest, "run").method == "kto, lora"
    by_hand = loop.training.model_copy(update={"method": "kto"})
    again = train_adapter(loop, by_hand, held, "run", lambda _: None, told.append).manifest
    assert (again.version, again.created_at) == (manifest.version, manifest.created_at)  # found, not trained again
    assert again.method_reason == manifest.method_reason


def test_a_method_without_data_stops_before_anything_is_loaded(make_loop):
    loop = make_loop(training={"method": "dpo"})
    held = dataset(loop, good=[], bad=BAD)
    with pytest.raises(TrainingError, match=r"dpo needs corrections .*dataset has 0 answers found good"):
        train_adapter(loop, loop.training, held, "run", lambda _: None, lambda _: None)


def test_a_preset_is_filled_for_the_method_that_auto_chose(make_loop, monkeypatch):
    loop = make_loop(training={"method": "auto", "preset": "cpu"})
    filled = []
    monkeypatch.setattr(train, "settled", lambda settings, _: filled.append(settings) or settings)

    def stop(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(train, "get_or_create", stop)
    with pytest.raises(InterruptedError):
        train_adapter(loop, loop.training, dataset(loop, good=GOOD[:5]), "run", lambda _: None, lambda _: None)
    assert [settings.method for settings in filled] == ["kto"]
