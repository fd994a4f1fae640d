"""Metadata of events: kept as it is, bounded, and never trained on."""

import json

import pytest
from pydantic import ValidationError

from finetune_pipeline.curation.snapshot import COLUMNS
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.pipeline import snapshot
from finetune_pipeline.records import MAX_METADATA_BYTES, Example
from finetune_pipeline_tests.conftest import feedback, interaction, uid

GIVEN = {"ticket": 7, "tags": ["a", None, {"é": 1.5}], "ok": True, "empty": {}}


def test_it_is_kept_with_the_event_and_is_in_no_snapshot(db):
    events = [
        interaction("a", metadata=GIVEN),
        feedback("f", "a", "thumbs_up", metadata={"page": "x"}),
        interaction("b"),
    ]
    with db.write() as connection:
        store.record(connection, "notes", [*events, interaction("b")], default_reward)
        assert store.record(connection, "notes", events, default_reward).conflicts == ()
        found = store.find_interaction(connection, uid("a"))
        assert store.find_interaction(connection, uid("b")).interaction.metadata is None
    assert found.interaction == events[0] and found.feedback == (events[1],)
    assert not {"metadata"} & {*COLUMNS, *snapshot.COLUMNS, *Example.model_fields}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (["x"], "valid dictionary"),
        ({"text": "é" * (MAX_METADATA_BYTES // 2)}, "bytes as JSON, at most 4,096 are kept"),
        ({"text": "a\x00b"}, "NUL character"),
        ({"a\x00": 1}, "NUL character"),
        ({"text": "\ud800"}, "unpaired surrogate"),
        ({"number": float("nan")}, ""),
        ({"object": object()}, ""),
    ],
)
@pytest.mark.parametrize("make", [lambda **m: interaction("a", **m), lambda **m: feedback("f", "a", "thumbs_up", **m)])
def test_what_cannot_be_kept_is_refused(make, metadata, reason):
    with pytest.raises(ValidationError, match=reason):
        make(metadata=metadata)


def test_the_limit_is_in_bytes():
    most = "x" * (MAX_METADATA_BYTES - len(json.dumps({"t": ""})))
    assert interaction("a", metadata={"t": most}).metadata == {"t": most}
