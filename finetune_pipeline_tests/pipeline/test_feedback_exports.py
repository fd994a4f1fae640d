"""Feedback exports of Open WebUI and Langfuse; the rows are ours, in the form of those tools' sources."""

import copy
import json

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.erasure import erase_user
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.search import InteractionFilter, search
from finetune_pipeline.pipeline.ingest import ingest_file
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.feedback_exports import export_format
from finetune_pipeline_tests.sources.test_files import write_as

MESSAGES = {
    "m1": {"id": "m1", "parentId": None, "role": "user", "content": "hello", "timestamp": 1767225600},
    "m2": {"id": "m2", "parentId": "m1", "childrenIds": ["m3"], "role": "assistant", "content": "hi", "model": "llama"},
    "m3": {"id": "m3", "parentId": "m2", "childrenIds": ["m4", "m5"], "role": "user", "content": "a wall"},
    "m4": {"id": "m4", "parentId": "m3", "role": "assistant", "content": "brick", "model": "llama",
           "timestamp": 1767225660},
    "m5": {"id": "m5", "parentId": "m3", "role": "assistant", "content": "timber", "model": "mistral"},
}  # fmt: skip
RATED = {
    "id": "f1", "user_id": "ann", "version": 0, "type": "rating",
    "data": {"rating": 1, "model_id": "llama", "sibling_model_ids": ["mistral"], "reason": "", "comment": ""},
    "meta": {"arena": False, "chat_id": "c1", "message_id": "m4", "message_index": 4, "model_id": "llama"},
    "snapshot": {"chat": {"id": "c1", "user_id": "bob", "title": "Walls",
                          "chat": {"title": "Walls", "history": {"messages": MESSAGES, "currentId": "m4"}}}},
    "created_at": 1767225700, "updated_at": 1767225700,
}  # fmt: skip

CORRECTION = {
    "id": "s1", "projectId": "p", "environment": "default", "name": "output", "dataType": "CORRECTION", "value": 0,
    "stringValue": "clay brick", "source": "ANNOTATION", "traceId": "t1", "observationId": None, "authorUserId": "ann",
    "timestamp": "2026-01-02T10:00:00.000Z", "createdAt": "2026-01-02T10:00:00.000Z",
    "updatedAt": "2026-01-02T10:00:00.000Z",
}  # fmt: skip
TRACE = {
    "id": "t1", "projectId": "p", "name": "chat", "timestamp": "2026-01-01T10:00:00.000Z", "userId": "bob",
    "input": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
              {"role": "user", "content": "a wall"}],
    "output": {"role": "assistant", "content": "brick"}, "metadata": {}, "tags": [], "scores": [], "observations": [],
}  # fmt: skip
OBSERVATION = {
    "id": "o1", "traceId": "t1", "type": "GENERATION", "startTime": "2026-01-01T10:00:00.000Z", "model": "llama",
    "input": TRACE["input"], "output": "brick",
}  # fmt: skip
QUALITY = {**CORRECTION, "id": "s0", "name": "quality", "dataType": "NUMERIC", "value": 0.9, "stringValue": None}
ON_OBSERVATION = {**CORRECTION, "observationId": "o1"}
V3 = {name: value for name, value in CORRECTION.items() if name not in {"traceId", "observationId", "stringValue"}}
V3 |= {"value": "clay brick", "subject": {"kind": "trace", "id": "t1"}}


def changed(row, path, value):
    """A copy of a row with another value at a path such as "meta.message_id"."""
    made = copy.deepcopy(row)
    *parents, last = path.split(".")
    inner = made
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return made


def without_time(row):
    return {name: value for name, value in row.items() if name != "timestamp" and not name.endswith("At")}


def read(loop, path, *rows, form="auto"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ingest_file(loop, connect(), path, default_reward, form)


def stored():
    with connect().read() as connection:
        return search(connection, "notes", InteractionFilter(), 10)


def said(interaction):
    return [(one.kind, one.correction, one.user) for one in interaction.feedback]


@pytest.fixture
def file(loop, tmp_path):
    return tmp_path / "export.jsonl"


def test_a_rating_of_open_webui_is_an_answer_with_a_thumb(loop, file):
    assert read(loop, file, RATED).rejected == 0
    (found,) = stored()
    given = found.interaction
    assert (given.prompt, given.output, given.model, given.user) == ("a wall", "brick", "llama", "bob")
    assert [(turn.role, turn.content) for turn in given.history] == [("user", "hello"), ("assistant", "hi")]
    assert given.created_at.isoformat() == "2026-01-01T00:01:00+00:00" and given.source is None
    assert said(found) == [("thumbs_up", None, "ann")] and found.example.reward == 1.0


# What a later export of the same rating says, and the feedback that counts then.
@pytest.mark.parametrize(
    ("path", "value", "kinds", "reward"),
    [
        ("version", 0, ["thumbs_up"], 1.0),
        ("data.rating", "-1", ["thumbs_up", "thumbs_down"], -1.0),
        ("data.rating", -1.0, ["thumbs_up", "thumbs_down"], -1.0),
        ("snapshot.chat.chat.history.messages.m4.originalContent", "brick", ["thumbs_up"], 1.0),
    ],
)
def test_a_rating_that_changed_is_later_feedback(loop, file, path, value, kinds, reward):
    read(loop, file, RATED)
    later = changed(changed(RATED, path, value), "updated_at", RATED["updated_at"] + (path != "version"))
    assert read(loop, file, RATED, later).conflicts == 0
    (found,) = stored()
    assert [one.kind for one in found.feedback][: len(kinds)] == kinds
    assert found.example.reward == reward


def test_an_answer_that_was_edited_in_open_webui_is_a_correction(loop, file):
    edited = changed(RATED, "snapshot.chat.chat.history.messages.m4.originalContent", "brick")
    read(loop, file, changed(edited, "snapshot.chat.chat.history.messages.m4.content", "clay brick"))
    (found,) = stored()
    assert found.interaction.output == "brick" and found.example.target == "clay brick"
    assert said(found) == [("thumbs_up", None, "ann"), ("correction", "clay brick", "ann")]


ORDERS = [
    [{**TRACE, "scores": [QUALITY, CORRECTION]}],
    [TRACE, CORRECTION],
    [CORRECTION, TRACE],
    [OBSERVATION, ON_OBSERVATION],
    [{**OBSERVATION, "scores": [ON_OBSERVATION]}],
    [{**TRACE, "observations": [OBSERVATION], "scores": [ON_OBSERVATION]}],
    [TRACE, {**CORRECTION, "stringValue": None, "value": "clay brick"}],
    [TRACE, V3],
    [{**V3, "subject": {"kind": "observation", "id": "o1", "traceId": "t1"}}, OBSERVATION],
    [TRACE, {**CORRECTION, "stringValue": None, "longStringValue": "clay brick"}],
    [{**TRACE, "input": {"messages": TRACE["input"], "temperature": 0}}, CORRECTION],
    [{**TRACE, "input": json.dumps(TRACE["input"]), "output": '{"role": "assistant", "content": "brick"}'}, CORRECTION],
    [{**TRACE, "output": {"choices": [{"message": {"role": "assistant", "content": "brick"}}]}}, CORRECTION],
]


@pytest.mark.parametrize("rows", ORDERS, ids=range(len(ORDERS)))
def test_a_corrected_output_of_langfuse_corrects_its_answer(loop, file, rows):
    assert read(loop, file, *rows).rejected == 0
    assert read(loop, file, *rows, *rows).conflicts == 0  # again, and twice
    (found,) = [one for one in stored() if one.feedback]
    given = found.interaction
    assert (given.prompt, given.output, len(given.history)) == ("a wall", "brick", 2)
    assert said(found) == [("correction", "clay brick", "ann")] and found.example.target == "clay brick"


def test_any_json_of_langfuse_is_text(loop, file):
    read(loop, file, {**TRACE, "input": {"question": "a wall"}, "output": {"element": "wall"}})
    (found,) = stored()
    assert (found.interaction.prompt, found.interaction.output) == ('{"question": "a wall"}', '{"element": "wall"}')


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_langfuse_exports_of_any_file_format_are_read(loop, tmp_path, suffix):
    cells = {**TRACE, "input": json.dumps(TRACE["input"]), "output": "brick"}
    rows = [{name: value for name, value in row.items() if isinstance(value, str)} for row in (cells, CORRECTION)]
    path = tmp_path / f"export.{suffix}"
    write_as(path, rows)
    report = ingest_file(loop, connect(), path, default_reward)
    assert report.rejected == 0, report.rejections
    (found,) = stored()
    assert found.example.target == "clay brick"


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        (changed(RATED, "data.rating", 7), "auto", "data.rating: found 7, expected 1 or -1"),
        (changed(RATED, "data.rating", None), "auto", "data.rating: found null, expected 1 or -1"),
        (changed(RATED, "meta.message_id", "gone"), "auto", "the rated message 'gone' is not an answer"),
        (changed(RATED, "meta.message_id", "m3"), "auto", "the rated message 'm3' is not an answer"),
        (changed(RATED, "snapshot", {}), "auto", "chat: found null, expected an object"),
        (changed(RATED, "updated_at", 4102444800), "auto", "updated_at: 2100-01-01T00:00:00+00:00 is in the future"),
        (changed(RATED, "snapshot.chat.chat.history.messages.m3.content", 5), "auto", "content: found a number"),
        (QUALITY, "auto", "dataType: found 'NUMERIC', expected CORRECTION"),
        ({**V3, "subject": {"kind": "session", "id": "s"}}, "auto", "subject.kind: found 'session', expected trace or"),
        ({**V3, "subject": {"kind": "trace"}}, "auto", "traceId, observationId: both are missing"),
        ({**CORRECTION, "traceId": ""}, "auto", "traceId, observationId: both are missing"),
        ({**CORRECTION, "stringValue": " "}, "auto", "expected the corrected output"),
        ({**CORRECTION, "updatedAt": "soon"}, "auto", "updatedAt: found 'soon', expected a time"),
        (
            without_time(CORRECTION),
            "auto",
            "found none of updatedAt, timestamp, createdAt; expected one of them with a",
        ),
        (without_time(TRACE), "auto", "found none of endTime, startTime, timestamp, createdAt; expected one of them"),
        ({**TRACE, "output": ""}, "auto", "output: is missing or empty"),
        ({**TRACE, "input": TRACE["input"][:2]}, "auto", "input: its last message is of 'assistant'"),
        ({"id": "t"}, "langfuse", "input: is missing or empty"),
        ({"prompt": "p", "output": "o"}, "open_webui", "data: found null, expected an object"),
        (["x"], "open_webui", "expected a JSON object"),
    ],
)
def test_a_row_that_cannot_be_used_is_rejected_with_the_reason(loop, file, row, form, reason):
    assert reason in read(loop, file, row, form=form).rejections[0][2]
    assert stored() == []


def test_a_chat_whose_messages_are_their_own_parents_ends(loop, file):
    assert read(loop, file, changed(RATED, "snapshot.chat.chat.history.messages.m1.parentId", "m4")).rejected == 0
    assert len(stored()[0].interaction.history) == 2


def test_other_rows_are_not_taken_for_exports():
    alpaca = {"id": "1", "instruction": "a wall", "input": "x", "output": "brick", "timestamp": "2026-01-01"}
    assert export_format(alpaca) is None and to_record(alpaca, "here").answer == "brick"
    assert export_format({"prompt": "p", "completion": "c", "data": {}, "meta": {}}) is None
    assert export_format([]) is None


def test_an_erased_person_is_not_brought_back_by_an_export(loop, file):
    read(loop, file, RATED, TRACE)
    with connect().write() as connection:
        erase_user(connection, "notes", "bob", default_reward)
    later = changed(RATED, "data.rating", -1)
    report = read(loop, file, later, {**TRACE, "id": "t2"})
    assert (report.rejected, stored()) == (2, [])
    with connect().read() as connection:
        assert store.counters(connection, "notes") == {}


def test_a_correction_of_an_export_has_to_pass_the_output_schema(loop, file, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    strict = loop.model_copy(update={"output_schema": str(schema)})
    report = read(strict, file, TRACE, CORRECTION)
    assert "the output schema of loop notes does not accept it" in report.rejections[0][2]
