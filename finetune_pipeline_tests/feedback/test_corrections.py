"""A correction that the loop's output schema rejects is refused before it is recorded."""

import json
import os

import pytest

from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.records import Feedback
from finetune_pipeline_tests.conftest import feedback, uid

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
    client.correct(id, GOOD)
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
