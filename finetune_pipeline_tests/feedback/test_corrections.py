"""A correction that the loop's output schema rejects is refused before it is recorded."""

import json
import os

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.formats import import_rows
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import counters
from finetune_pipeline.pipeline.ingest import ingest_file
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.records import Feedback
from finetune_pipeline.settings import FilesSource
from finetune_pipeline.sources.files import read_file
from finetune_pipeline.sources.row_readers import read_rows
from finetune_pipeline_tests.conftest import feedback, interaction, uid

SCHEMA = {"type": "object", "properties": {"element": {"enum": ["wall", "door"]}}, "required": ["element"]}
GOOD = '{"element": "wall"}'
BAD = [
    ("a wall", "correction: not JSON"),
    ('```json\n{"element": "wall"}\n```', "correction: not JSON"),
    ('{"element": "boat"}', "correction: $.element: 'boat' is not one of ['wall', 'door']"),
    ("{}", "correction: $: 'element' is a required property"),
    ('{"element": NaN}', "correction: not JSON"),
    ("[" * 5_000, "correction: "),
]


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.fixture
def strict(loop, schema):
    """A loop with answers of this schema."""
    return loop.model_copy(update={"output_schema": str(schema)})


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("how", ["correct", "log_many"])
def test_the_client_refuses_it(db, strict, how, text, said):
    client = FeedbackClient(strict, database=db)
    id = client.log("a wall", GOOD)
    client.thumbs_up(id)
    with pytest.raises(ValueError, match="the output schema of loop notes does not accept it") as error:
        if how == "correct":
            client.correct(id, text)
        else:
            client.log_many([{"interaction_id": id, "kind": "correction", "correction": text}])
    assert str(error.value).startswith(said)
    assert (client.stats()["feedback"], client.stats()["rewarded"]) == (1, 1)
    client.correct(id, '{"element": "door"}')
    assert client.stats()["corrected"] == 1


def test_a_record_is_checked_as_well(db, strict):
    bad: Feedback = feedback("a", "b", "correction", correction="boat")
    with pytest.raises(ValueError, match="output schema"):
        FeedbackClient(strict, database=db).log_many([bad])


def test_a_client_with_settings_checks_before_it_sends(gateway, strict):
    with FeedbackClient(strict, url=gateway.url, api_key=gateway.key) as client:
        with pytest.raises(ValueError, match="output schema"):
            client.correct(uid("a"), "boat")
        client.correct(uid("a"), GOOD)
    assert [item["correction"] for item in gateway.feedback] == [GOOD]


def ingested(loop, file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ingest_file(loop, connect(), file, default_reward)
    return [reason for _, _, reason in report.rejections]


def imported(loop, file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [line.reason for line in import_rows(file, read_rows(file, 10_000), loop, connect()).invalid]


def synced(loop, file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(kind="files", name="dropped", path=str(file))
    sync_source(loop, source, connect(), lambda source, cursor: read_file(file, file.name, "auto", 10_000))
    with connect().read() as connection:
        return list(connection.execute(sa.select(t.skipped_records.c.reason)).scalars())


def events(correction):
    return [json.loads(one.model_dump_json()) for one in
            (interaction("a", output=GOOD), feedback("f", "a", "correction", correction=correction))]  # fmt: skip


def rows(correction):
    return [{"prompt": "a wall", "output": GOOD, "correction": correction}, {"prompt": "a door", "output": GOOD}]


@pytest.mark.parametrize(
    ("read", "lines"), [(ingested, events), (ingested, rows), (imported, events), (imported, rows), (synced, rows)]
)
@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_a_line_of_a_file_with_it_is_rejected_and_the_others_are_read(
    own_home, tmp_path, strict, read, lines, text, said
):
    (reason,) = read(strict, tmp_path / "log.jsonl", lines(text))
    assert reason.startswith(said) and "the output schema of loop notes does not accept it" in reason
    with connect().read() as connection:
        counted = counters(connection, "notes")
    assert (counted["interactions"], counted["corrected"], counted["feedback.correction"]) == (1, 0, 0)
    other = '{"element": "door"}'
    assert read(strict, tmp_path / "log.jsonl", lines(other)) == []
    with connect().read() as connection:
        assert counters(connection, "notes")["corrected"] == 1


def test_free_text_is_never_refused(db, loop):
    client = FeedbackClient(loop, database=db)
    client.correct(client.log("a", "b"), "not JSON")


def test_the_schema_is_read_again_when_it_changes(strict, schema):
    assert correction_problem(strict, GOOD) is None
    schema.write_text(json.dumps({"type": "array"}))
    os.utime(schema, ns=(1, 1))
    assert "is not of type 'array'" in correction_problem(strict, GOOD)


@pytest.mark.parametrize("content", [None, "{", '{"type": 7}'])
def test_a_damaged_schema_does_not_refuse_feedback(strict, schema, content, caplog):
    schema.unlink() if content is None else schema.write_text(content)
    assert correction_problem(strict, "anything") is None
    assert "is not checked against the output schema" in caplog.text
