"""Invalid requests are refused with the name of the wrong field; feedback counts once."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

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
        ("top_p", 0),
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
        ("metadata", {"ticket": 7}),
        ("metadata", {"domain": "\x00"}),
        ("metadata", ["x"]),
        ("logit_bias", {"5": 100}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -2),
        ("n", 0),
        ("top_logprobs", 5),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": "x"}}),
        ("tools", [{"type": "function"}]),
        ("temprature", 0.5),
        ("__proto__", {}),
        ("max tokens", 5),
    ],
)
def test_a_wrong_or_unknown_field_is_refused_by_name(notes, field, value):
    error = refused(post(notes, CHAT, {**BODY, field: value}))
    assert field in error["message"]
    assert error["param"].startswith(field)


def test_the_first_wrong_fields_are_named_and_the_others_counted(notes):
    wrong = {**BODY, "seed": -2, "top_p": 7, "n": 7, "stream": 7, "user": 7}
    message = refused(post(notes, CHAT, wrong))["message"]
    assert message.count("expected") == 3
    assert "(and 2 more)" in message


def test_unsupported_fields_are_accepted_without_effect(notes):
    no_effect = {"n": 1, "tools": [], "logit_bias": {}, "presence_penalty": 0, "store": True, "tool_choice": "none"}
    no_effect |= {"stop": [], "top_logprobs": 0, "functions": None, "service_tier": "auto", "reasoning_effort": "low"}
    assert post(notes, CHAT, {**BODY, **no_effect}).status_code == 200


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
    assert wrong.headers["allow"] == "POST"


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
        ({"kind": "thumbs_up", "extra": 1}, "extra: unknown field"),
        ({"kind": "thumbs_up", "origin": "app"}, "origin: unknown field; renamed to provenance"),
        ({"kind": "thumbs_up", "task": "notes"}, "task: unknown field; renamed to loop"),
        ({"kind": "thumbs_up", "loop": "windows"}, "No loop 'windows' is served"),
    ],
)
def test_invalid_feedback_is_refused(notes, answered, fields, reason):
    response = post(notes, "/v1/feedback", {"interaction_id": answered, **fields})
    assert reason in refused(response, 404 if "loop" in fields else 400)["message"]
    assert notes.interaction(answered)["feedback"] == []


def test_a_correction_that_the_output_schema_rejects_is_refused(notes, answered, tmp_path, monkeypatch):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"element": {"enum": ["door"]}}}')
    strict = notes.gateway.loops["notes"].model_copy(update={"output_schema": str(schema)})
    monkeypatch.setitem(notes.gateway.loops, "notes", strict)
    body = {"interaction_id": answered, "kind": "correction", "loop": "notes"}
    for correction, said in (("a door", "not JSON"), ('{"element": "boat"}', "$.element: 'boat' is not one of")):
        error = refused(post(notes, "/v1/feedback", body | {"correction": correction}))
        assert (error["param"], said in error["message"]) == ("correction", True)
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
