"""Invalid requests are refused with the name of the wrong field; feedback counts once."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from pydantic import ValidationError

from finetune_pipeline.serving.api import ChatRequest, CompletionRequest, InteractionIn
from finetune_pipeline.serving.app import BODIES
from finetune_pipeline.serving.responses_schema import ResponsesRequest
from finetune_pipeline.validation_messages import error_message
from finetune_pipeline_tests.serving.conftest import PROMPT

CHAT = "/v1/chat/completions"
BODY = {"model": "notes", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}


def post(notes, path, content):
    if isinstance(content, dict):
        content = json.dumps(content)
    return notes.http.post(path, content=content, headers={"Content-Type": "application/json"})


def refused(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.fixture
def answered(notes):
    return notes.ask(max_tokens=16).json()["id"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b"\xff\xfe{}",
        b'{"model": "notes", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "a\nb"}]}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"model": "notes", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b"[" * 100_000,
        b'{"model": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/feedback", "/v1/interactions"])
def test_invalid_json_is_refused(notes, content, path):
    refused(post(notes, path, content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", True),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", 10**400),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("seed", -2),
        ("seed", 2**32 - 1),
        ("seed", 0.5),
        ("stream", "yes"),
        ("stream", 1),
        ("stop", 7),
        ("stop", ["x"] * 17),
        ("model", ""),
        ("model", None),
        ("model", "x" * 201),
        ("messages", "hello"),
        ("messages", {}),
        ("user", "x" * 201),
        ("user", "a\x00b"),
        ("user", {"name": "ada"}),
        ("metadata", {"ticket": "x" * 4_096}),
        ("metadata", {"ticket": "\x00"}),
        ("metadata", {"interaction_id": "7"}),
        ("metadata", {"domain": "\x00"}),
        ("metadata", ["x"]),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"wall": 5}),
        ("logit_bias", {"999999999": 5}),
        ("logit_bias", [[5]]),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repeat_penalty", 0),
        ("top_k", -2),
        ("min_p", 2),
        ("typical_p", 0),
        ("n", 0),
        ("n", 65),
        ("top_logprobs", 21),
        ("guided_regex", "[a-z]+"),
        ("guided_choice", ["a", "b"]),
        ("guided_json", "{"),
        ("grammar", 'root ::= "a"'),
        ("structured_outputs", {"regex": "[a-z]+"}),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", "x"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": "x"}}),
        ("tools", [{"type": "function"}]),
    ],
)
def test_a_wrong_field_is_refused_by_name(notes, field, value):
    error = refused(post(notes, CHAT, {**BODY, field: value}))
    assert field in error["message"]
    assert error["param"] is None or error["param"].startswith(field)  # the model refuses some, without a field


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        (CHAT, {"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (CHAT, {"metadata": {"interaction_id": "first"}}, "metadata.interaction_id"),
        (CHAT, {"metadata": {"domain": 5}}, "metadata.domain"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ],
)
def test_a_wrong_part_of_a_field_is_named_as_the_client_wrote_it(notes, path, fields, param):
    base = BODY if path == CHAT else {"model": "notes", "input": "a wall"}
    error = refused(post(notes, path, {**base, **fields}))
    assert (error["param"], error["message"].partition(": ")[0]) == (param, param)


def test_the_first_wrong_fields_are_named_and_the_others_counted(notes):
    wrong = {**BODY, "seed": -2, "top_p": 7, "n": 0, "stream": 7, "user": 7}
    message = refused(post(notes, CHAT, wrong))["message"]
    assert message.count("expected") == 3
    assert "(and 2 more)" in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "x"}] * 60_000}),
        (CHAT, {"messages": [{"role": "user", "content": 5}] * 40_000}),
        (CHAT, {"messages": [{"role": "user", "content": ""}] * 40_000}),
        (CHAT, {"stop": [5] * 300_000}),
        (CHAT, {f"field {n}": 1 for n in range(60_000)} | {"max_tokens": 0}),
        ("/v1/responses", {"input": [{"role": "x"}] * 60_000}),
        ("/v1/feedback", {f"field {n}": 1 for n in range(60_000)}),
        ("/v1/interactions", {"history": [{"role": "x"}] * 60_000}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_body_of_very_many_errors_is_refused_within_the_clients_time(notes, path, body):
    base = BODY if path == CHAT else {"model": "notes"} if path == "/v1/responses" else {}
    refused(post(notes, path, {**base, **body}))
    assert notes.health()["status"] == "ok"


@pytest.mark.parametrize("field", ["guided_json", "structured_outputs"])
@pytest.mark.parametrize("depth", [100, 300, 900])
def test_a_deeply_nested_schema_in_a_text_is_refused(notes, field, depth):
    text = '{"items":' * depth + "{}" + "}" * depth
    error = refused(notes.ask(**{field: text if field == "guided_json" else {"json": text}}))
    assert "nested more than 60 levels deep" in error["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "pattern": "(((((((((("},
        {"type": "string", "pattern": "^a{1000000000}$"},
        {"type": "string", "pattern": "^(((((a{99}){99}){99}){99}){99})$"},
        {"anyOf": [{"type": "string", "minLength": 2_000, "title": str(n)} for n in range(1_000)]},
        {"$ref": "#/nowhere"},
        {"type": "gibberish"},
        {"type": ["object", 7]},
        {"enum": []},
        {"anyOf": []},
        {"properties": 7},
        {"enum": [f"value {n}" for n in range(30_000)]},
    ],
)
def test_an_unusable_schema_is_refused_and_the_model_continues(notes, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = notes.ask(response_format=form, max_tokens=4)
    if response.status_code != 200:  # some of these can be enforced
        assert refused(response)["code"] == "request_refused"
    assert notes.ask(max_tokens=4).status_code == 200
    assert notes.health()["status"] == "ok"


MANY = 2000
USERS = {"messages": [{"role": "user", "content": PROMPT}]}
INVALID_LISTS = {
    "messages": (ChatRequest, {"messages": [{"role": 7}] * MANY}),
    "content": (ChatRequest, {"messages": [{"role": "user", "content": [{"type": 7}] * MANY}]}),
    "tools": (ChatRequest, {**USERS, "tools": [{"type": 7}] * MANY}),
    "functions": (ChatRequest, {**USERS, "functions": [7] * MANY}),
    "stop": (ChatRequest, {**USERS, "stop": [7] * MANY}),
    "logit_bias": (ChatRequest, {**USERS, "logit_bias": {str(number): "x" for number in range(MANY)}}),
    "pairs of logit_bias": (ChatRequest, {**USERS, "logit_bias": [[number, "x"] for number in range(MANY)]}),
    "prompt": (CompletionRequest, {"prompt": [7] * MANY}),
    "input": (ResponsesRequest, {"input": [{"type": 7}] * MANY}),
    "content of input": (ResponsesRequest, {"input": [{"role": "user", "content": [{"type": 7}] * MANY}]}),
    "tools of responses": (ResponsesRequest, {"input": PROMPT, "tools": [{"type": 7}] * MANY}),
    "include": (ResponsesRequest, {"input": PROMPT, "include": [7] * MANY}),
    "history": (InteractionIn, {"loop": "notes", "prompt": "x", "output": "y", "history": [{"a": 1}] * MANY}),
}


@pytest.mark.parametrize("field", INVALID_LISTS)
def test_a_list_of_invalid_items_is_validated_to_the_first_one(field):
    model, fields = INVALID_LISTS[field]
    body = fields if model is InteractionIn else {"model": "notes", **fields}
    with pytest.raises(ValidationError) as refused:
        model.model_validate_json(json.dumps(body))
    assert refused.value.error_count() < 5
    assert field.split()[-1] in error_message(refused.value) or "tools" in error_message(refused.value)


def lists_without_fail_fast(schema, path=""):
    """Yield where a schema of pydantic's core validates items of a list or tuple after an invalid one."""
    if isinstance(schema, dict):
        item = schema.get("items_schema", {"type": "any"})
        limited = schema.get("fail_fast") or schema.get("max_length") == 0
        checks_items = item if isinstance(item, list) else item["type"] != "any"
        if str(schema.get("type")) in {"list", "tuple", "set", "frozenset"} and checks_items and not limited:
            yield path
        for name, inner in schema.items():
            if name != "python_schema":  # of any JSON value
                yield from lists_without_fail_fast(inner, f"{path}.{name}")
    elif isinstance(schema, list | tuple):
        for number, inner in enumerate(schema):
            yield from lists_without_fail_fast(inner, f"{path}[{number}]")


@pytest.mark.parametrize("path", BODIES)
def test_every_list_of_a_request_fails_fast(path):
    assert list(lists_without_fail_fast(BODIES[path].__pydantic_core_schema__)) == []


@pytest.mark.parametrize("depth", [60, 150, 10_000])
def test_a_deeply_nested_schema_is_refused_and_the_model_continues(notes, depth):
    schema = '{"type": "array", "items": ' * depth + "{}" + "}" * depth
    form = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'
    body = json.dumps(BODY)[:-1] + f', "response_format": {form}}}'
    assert post(notes, CHAT, body).status_code in {200, 400}
    assert notes.ask(max_tokens=4).status_code == 200


def test_nan_in_a_schema_is_refused(notes):
    form = '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [NaN, Infinity]}}}'
    refused(post(notes, CHAT, json.dumps(BODY)[:-1] + f', "response_format": {form}}}'))


def test_unknown_paths_and_methods_return_errors_in_openais_format(notes):
    refused(notes.http.get("/v1/nothing"), 404)
    refused(notes.http.get("/../../etc/passwd"), 404)
    wrong = notes.http.get(CHAT)
    refused(wrong, 405)
    assert wrong.headers["allow"] == "POST, OPTIONS"


# ---- feedback


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "reward", "reward": 7}, ", expected less than or equal to 1"),
        ({"kind": "reward"}, "kind reward needs `reward`"),
        ({"kind": "reward", "reward": "0.5"}, "reward: found '0.5', expected a number"),
        ({"kind": "success"}, "kind success needs `score`"),
        ({"kind": "success", "score": 101}, "score: found 101, expected less than or equal to 100"),
        ({"kind": "rating", "rating": "6"}, ", expected '1', '2', '3', '4', '5' or 'gold'"),
        ({"kind": "rating", "rating": 6}, ", expected '1', '2', '3', '4', '5' or 'gold'"),
        ({"kind": "rating", "rating": True}, ", expected '1', '2', '3', '4', '5' or 'gold'"),
        ({"kind": "correction", "correction": "  "}, "kind correction needs the corrected answer"),
        ({"kind": "correction", "correction": "a\x00b"}, "contains a NUL character"),
        ({"kind": "applause"}, "kind: found 'applause', expected 'success', 'correction'"),
        ({"kind": "thumbs_up", "id": "not-an-id"}, "id: found 'not-an-id', expected a UUID"),
        ({"kind": "thumbs_up", "created_at": "yesterday"}, "created_at: found 'yesterday', expected a time such as"),
        ({"kind": "thumbs_up", "created_at": "0001-01-01T00:00:00+14:00"}, "is before the year 1"),
        ({"kind": "thumbs_up", "output_hash": "x"}, "output_hash: found 'x', expected a SHA-256"),
        ({"kind": "thumbs_up", "extra": 1}, "'extra': unknown field"),
        ({"kind": "thumbs_up", "origin": "app"}, "origin: unknown field; renamed to provenance"),
        ({"kind": "thumbs_up", "task": "notes"}, "task: unknown field; renamed to loop"),
        ({"kind": "thumbs_up", "loop": "windows"}, "No loop 'windows' is served"),
    ],
)
def test_invalid_feedback_is_refused(notes, answered, fields, reason):
    response = post(notes, "/v1/feedback", {"interaction_id": answered, **fields})
    assert reason in refused(response, 404 if "loop" in fields else 400)["message"]
    assert notes.interaction(answered)["feedback"] == []


@pytest.mark.parametrize(
    ("correction", "said"), [("a door", "not JSON"), ('{"element": "boat"}', "$.element: 'boat' is not one of")]
)
def test_a_correction_that_the_output_schema_rejects_is_refused(
    notes, answered, tmp_path, monkeypatch, correction, said
):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"element": {"enum": ["door"]}}}')
    strict = notes.gateway.loops["notes"].model_copy(update={"output_schema": str(schema)})
    monkeypatch.setitem(notes.gateway.loops, "notes", strict)
    body = {"interaction_id": answered, "kind": "correction", "loop": "notes"}
    error = refused(post(notes, "/v1/feedback", body | {"correction": correction}))
    assert error["param"] == "correction" and said in error["message"]
    assert notes.interaction(answered)["feedback"] == []
    assert post(notes, "/v1/feedback", body | {"correction": '{"element": "door"}'}).status_code == 200


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_reward_that_is_not_finite_is_refused(notes, answered, word):
    body = f'{{"interaction_id": "{answered}", "kind": "reward", "reward": {word}}}'
    refused(post(notes, "/v1/feedback", body))
    assert notes.interaction(answered)["feedback"] == []


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"kind": "thumbs_up"}, 0.7, 1.0),
        ({"kind": "thumbs_down"}, -1.0, -0.9),
        ({"kind": "success", "score": 90}, 0.8, 1.0),
        ({"kind": "validation_failure", "score": 10}, -1.0, -0.3),
        ({"kind": "rating", "rating": "gold"}, 1.0, 1.0),
        ({"kind": "rating", "rating": 5}, 0.9, 0.9),
        ({"kind": "reward", "reward": 0.25}, 0.25, 0.25),
        ({"kind": "correction", "correction": '{"element":"door"}'}, 0.2, 0.6),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_every_kind_of_feedback_has_its_reward(notes, answered, fields, low, high):
    receipt = post(notes, "/v1/feedback", {"interaction_id": answered, "user": "ada", **fields})
    assert (receipt.status_code, receipt.json()["status"]) == (200, "recorded")
    found = notes.interaction(answered)
    assert low <= found["reward"] <= high
    assert found["feedback"][0]["kind"] == fields["kind"]
    if fields["kind"] == "correction":
        assert found["target"] == fields["correction"]


def test_feedback_from_the_future_is_refused(notes, answered):
    ahead = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    given = {"interaction_id": answered, "kind": "thumbs_up", "created_at": ahead}
    assert "is in the future" in refused(notes.http.post("/v1/feedback", json=given), 409)["message"]


@pytest.mark.parametrize("field", ["source", "provenance"])
def test_an_application_cannot_claim_a_declared_source(notes, field):
    logged = {"loop": "notes", "prompt": "p", "output": "o", field: "vault"}
    assert field in refused(post(notes, "/v1/interactions", logged))["message"]


@pytest.mark.parametrize(
    "names", [{"task": "notes"}, {"loop": "notes", "task": "notes"}], ids=["the old name", "both names"]
)
def test_the_old_name_of_the_loop_is_refused_with_the_new_one(notes, names):
    counted = notes.http.get("/v1/feedback/stats").json()["interactions"]
    message = refused(post(notes, "/v1/interactions", {"prompt": "p", "output": "o", **names}))["message"]
    assert "task: unknown field; renamed to loop" in message
    assert notes.http.get("/v1/feedback/stats").json()["interactions"] == counted


def test_feedback_sent_twice_counts_once(notes, answered):
    body = {"id": str(uuid4()), "interaction_id": answered, "kind": "thumbs_up"}
    statuses = [post(notes, "/v1/feedback", body).json()["status"] for _ in range(3)]
    assert statuses == ["recorded", "duplicate", "duplicate"]
    assert len(notes.interaction(answered)["feedback"]) == 1


@pytest.mark.parametrize(
    ("path", "first", "other"),
    [
        ("/v1/feedback", {"kind": "thumbs_up"}, {"kind": "thumbs_down"}),
        ("/v1/feedback", {"kind": "correction", "correction": "x"}, {"kind": "correction", "correction": "y"}),
        ("/v1/interactions", {"prompt": "p", "output": "o"}, {"prompt": "p", "output": "another"}),
    ],
)
def test_an_id_with_other_content_is_refused(notes, answered, path, first, other):
    own = {"id": str(uuid4()), "loop": "notes"} | ({"interaction_id": answered} if path == "/v1/feedback" else {})
    assert [post(notes, path, own | first).json()["status"] for _ in range(2)] == ["recorded", "duplicate"]
    error = refused(notes.http.post(path, json=own | other), 409)
    assert error["code"] == "id_taken" and f"{own['id']} already exists with different content" in error["message"]
    assert post(notes, path, own | first).json()["status"] == "duplicate"


def test_feedback_sent_by_16_clients_at_once_counts_once(notes, answered):
    before = notes.http.get("/v1/feedback/stats").json()
    body = {"id": str(uuid4()), "interaction_id": answered, "kind": "thumbs_up"}
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: post(notes, "/v1/feedback", body).json()["status"], range(32)))
    assert sorted(statuses) == ["duplicate"] * 31 + ["recorded"]
    assert len(notes.interaction(answered)["feedback"]) == 1
    after = notes.http.get("/v1/feedback/stats").json()
    assert after["by_kind"]["thumbs_up"] == before["by_kind"].get("thumbs_up", 0) + 1


def test_feedback_waits_for_its_interaction(notes):
    id = str(uuid4())
    early = {"interaction_id": id, "kind": "correction", "correction": "right"}
    waiting = notes.http.get("/v1/feedback/stats").json()["unmatched"]
    assert post(notes, "/v1/feedback", early).json()["status"] == "unmatched"
    assert notes.http.get("/v1/feedback/stats").json()["unmatched"] == waiting + 1
    refused(notes.http.get(f"/v1/interactions/{id}"), 404)
    logged = {"id": id, "loop": "notes", "prompt": "a late prompt", "output": "wrong", "user": "ada"}
    assert post(notes, "/v1/interactions", logged).json() == {"id": id, "status": "recorded"}
    assert post(notes, "/v1/interactions", logged).json() == {"id": id, "status": "duplicate"}
    found = notes.interaction(id)
    assert (found["target"], len(found["feedback"])) == ("right", 1)
    assert notes.http.get("/v1/feedback/stats").json()["unmatched"] == waiting


def test_unicode_text_is_recorded_unchanged(notes):
    text = "Mauer Größe 壁 🧱 \u202e \ufeff e\u0301 \\u0000 \r\n\t\x7f"
    answer = notes.ask(text, user="Zoë 🧱", max_tokens=4).json()
    kept = notes.interaction(answer["id"])["interaction"]
    assert (kept["prompt"], kept["user"]) == (text, "Zoë 🧱")
