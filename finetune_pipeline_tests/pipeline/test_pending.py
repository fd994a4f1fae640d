"""New examples are those that the dataset would keep, redacted, until they were judged."""

import pytest

from finetune_pipeline.artifacts import draft, publish
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import mark_judged, record
from finetune_pipeline.manifests import AdapterManifest
from finetune_pipeline.orchestration.curated_dataset import _metadata
from finetune_pipeline.pipeline import snapshot as snapshots
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.evaluate import trained_contents
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.records import Turn
from finetune_pipeline_tests.conftest import dataset_rows, feedback, interaction

MAIL = "ann@example.com"


def add(loop, *events):
    with connect().write() as connection:
        record(connection, loop.name, events, default_reward)


def corrected_events(name, prompt, answer="noted", **fields):
    return [
        interaction(name, prompt=prompt, **fields),
        feedback(f"on {name}", name, "correction", correction=answer),
    ]


def adapter_of(loop, data):
    """An adapter that says it was trained on this dataset."""
    names = "steps examples too_long loss_before loss_after train_loss tokens_per_second wall_seconds"
    numbers = dict.fromkeys([*names.split(), "peak_memory_bytes", "watermark"], 1)
    with draft(loop.name, AdapterManifest.stage, "v1") as folder:
        fields = {
            "loop": loop.name, "version": "v1", "inputs": {"curated_dataset": data.manifest.version}, "settings": {},
            "packages": {}, "base_model": "b", "base_hash": "h", "mode": "full", "device": "cpu", **numbers,
        }  # fmt: skip
        return publish(folder, AdapterManifest, fields)


def test_examples_that_differ_only_by_a_secret_count_once(loop):
    add(loop, *corrected_events("a", f"write to {MAIL}"), *corrected_events("b", "write to bob@example.com"))
    assert count_new(loop, connect(), watermark=0) == 1


def test_the_same_prompt_in_another_conversation_counts_too(loop):
    turns = (Turn(role="user", content="about the ash"),)
    add(loop, *corrected_events("a", "what now?"), *corrected_events("b", "what now?", history=turns))
    assert count_new(loop, connect(), watermark=0) == 2


@pytest.mark.parametrize("least", [0, 0.85, 1])
@pytest.mark.parametrize("confidence", [None, 0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ({"kind": "success", "score": 95}, True),
        ({"kind": "reward", "reward": 0.9}, True),
        ({"kind": "thumbs_up"}, False),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_count_and_the_dataset_agree_on_confidence(loop, least, confidence, said, holds):
    loop = loop.model_copy(update={"curation": loop.curation.model_copy(update={"min_confidence": least})})
    asked = interaction("b", prompt="how long is it?", output="six feet", confidence=confidence)
    add(loop, *corrected_events("a", "what now?"), asked, feedback("on b", "b", **said))
    low = holds and confidence is not None and confidence < least  # missing confidence is not low confidence
    assert count_new(loop, connect(), watermark=0) == (1 if low else 2)
    snapshot, _ = snapshots.snapshot(loop, connect())
    data = build_dataset(loop, snapshot)
    refused = {f"confidence below {least:g} and no person confirmed it": 1} if low else {}
    assert (data.manifest.train + data.manifest.validation, data.manifest.left_out) == (1 if low else 2, refused)


def test_examples_that_were_judged_never_count_again(loop):
    history = (Turn(role="user", content=f"I am {MAIL}"),)
    add(
        loop,
        *corrected_events("a", f"write to {MAIL}"),
        *corrected_events("b", "what now?", f"mail {MAIL}", history=history),
    )
    snapshot, _ = snapshots.snapshot(loop, connect())
    data = build_dataset(loop, snapshot)
    adapter_of(loop, data)
    with connect().write() as connection:
        mark_judged(connection, loop.name, trained_contents(loop.name, "v1"))
    assert count_new(loop, connect(), watermark=0) == 0
    add(loop, *corrected_events("again", f"write to {MAIL}"))  # logged once more, with another id
    assert count_new(loop, connect(), watermark=0) == 0
    add(loop, *corrected_events("other", "write to nobody"))
    assert count_new(loop, connect(), watermark=0) == 1


def test_no_secret_reaches_a_dataset_and_the_counts_are_shown(loop):
    history = (Turn(role="user", content=f"I am {MAIL}"),)
    add(
        loop,
        *corrected_events("a", f"write to {MAIL} or +49 30 901820"),
        *corrected_events("b", "what now?", f"mail {MAIL}", history=history),
    )
    snapshot, _ = snapshots.snapshot(loop, connect())
    data = build_dataset(loop, snapshot)
    assert data.manifest.redacted == {"email": 3, "phone": 1}
    metadata = _metadata(data)
    assert metadata["redacted values"] == 4
    assert metadata["redacted values, by kind"].value == "| kind | number |\n|---|---|\n| email | 3 |\n| phone | 1 |"
    written = [path for path in data.path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"example.com" in path.read_bytes()]
    prompts = {row["prompt"] for split in ("train", "validation") for row in dataset_rows(data.path, split)}
    assert prompts == {"write to [EMAIL] or [PHONE]", "what now?"}
