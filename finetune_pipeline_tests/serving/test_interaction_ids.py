"""Ids that clients choose: one request, answered and recorded once, however often it is sent."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID, uuid4

import openai
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline_tests.serving.conftest import LONG, PROMPT, events, make_loop, serving
from finetune_pipeline_tests.waiting import wait_until

USER = {"role": "user", "content": PROMPT}
HEADER = "X-Interaction-Id"


def send(running, id, in_header=True, path="chat/completions", headers=None, **fields):
    """Send a request with this id."""
    what = {"messages": [USER]} if path == "chat/completions" else {"prompt": PROMPT}
    body = {"model": "notes", "temperature": 1.5, "max_tokens": 20, **what, **fields}
    if not in_header:
        body["metadata"] = {"interaction_id": str(id), **body.get("metadata", {})}
    headers = {**(headers or {}), **({HEADER: str(id)} if in_header else {})}
    return running.http.post(f"/v1/{path}", json=body, headers=headers)


def content(response) -> str:
    """Return the text of a response or a stream."""
    assert response.status_code == 200, response.text
    stream = response.headers["content-type"].startswith("text/event-stream")
    texts = []
    for choice in (
        choice for chunk in (events(response) if stream else [response.json()]) for choice in chunk["choices"]
    ):
        texts.append(choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or "")
    return "".join(texts)


@contextmanager
def store_stopped(running):
    """Keep events in the write-ahead log, as while the database is locked."""
    recorder = running.gateway.recorder
    moved, resume = recorder._move_to_store, threading.Event()

    def wait(lines):
        assert resume.wait(60)
        moved(lines)

    recorder._move_to_store = wait
    try:
        yield
    finally:
        resume.set()
        recorder._move_to_store = moved


@pytest.mark.parametrize("in_header", [True, False], ids=["header", "metadata"])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_id_is_the_interactions(notes, in_header, path, stream):
    id = uuid4()
    response = send(notes, id, in_header, path, stream=stream)
    text = content(response)
    first = events(response)[0] if stream else response.json()
    assert first["id"] == response.headers["x-interaction-id"] == response.headers["x-request-id"] == str(id)
    assert notes.interaction(str(id))["interaction"]["output"] == text


def test_without_an_id_the_response_has_a_new_one_everywhere(notes):
    response = notes.ask(max_tokens=2)
    assert response.json()["id"] == response.headers["x-interaction-id"] == response.headers["x-request-id"]
    answer = notes.openai().chat.completions.create(model="notes", messages=[USER], max_tokens=2)
    assert answer._request_id == answer.id


@pytest.mark.parametrize("given", ["7", "", "not-an-id", "ü"])
def test_an_id_must_be_a_uuid(notes, given):
    response = notes.http.post(
        "/v1/chat/completions", json={"model": "notes", "messages": [USER]}, headers={HEADER: given.encode("latin-1")}
    )
    assert response.status_code == 400
    assert "expected a UUID" in response.json()["error"]["message"]
    response = send(notes, given, in_header=False)
    assert response.status_code == 400
    assert "expected a UUID" in response.json()["error"]["message"]


REFUSED = {
    "wrong type": ({"max_tokens": "x"}, 400),
    "fields that contradict": ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, 400),
    "tool choice": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, 400),
    "metadata": ({"metadata": {"note": "x" * 5000}}, 400),
    "prompt": ({"messages": [{"role": "user", "content": "a " * 2000}]}, 400),
    "model": ({"model": "nobody"}, 404),
    "version": ({"model": "notes@v9.9.9"}, 404),
    "size": ({"messages": [{"role": "user", "content": "a" * 2**21}]}, 413),
}


def known(response):
    """Return the ids in the headers of an error response."""
    return response.headers.get("x-request-id"), response.headers.get("x-interaction-id")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chosen", ["header", "metadata", None])
def test_refused_requests_return_the_id_as_far_as_it_is_known(notes, case, stream, chosen):
    fields, status = REFUSED[case]
    id = str(uuid4())
    if chosen == "metadata":
        fields = {**fields, "metadata": {"interaction_id": id, **fields.get("metadata", {})}}
    response = notes.http.post(
        "/v1/chat/completions",
        json={"model": "notes", "messages": [USER], "stream": stream, **fields},
        headers={HEADER: id} if chosen == "header" else {},
    )
    assert response.status_code == status, response.text
    if chosen == "header":
        assert known(response) == (id, id)
    elif case in ("wrong type", "size"):  # a body that is not valid names no id
        assert known(response) == (None, None)
    elif chosen == "metadata":
        assert known(response) == (id, id)
    else:
        request, interaction = known(response)
        assert request == interaction and UUID(request)
    if (found := known(response)[1]) is not None:
        assert notes.http.get(f"/v1/interactions/{found}").status_code == 404


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_each_api_returns_the_id_with_its_errors(notes, path):
    what = {"chat/completions": {"messages": [USER]}, "completions": {"prompt": "x"}, "responses": {"input": "x"}}[path]
    id, body = str(uuid4()), {"model": "notes", **what}
    assert known(notes.http.post(f"/v1/{path}", json={**body, "top_p": 7}, headers={HEADER: id})) == (id, id)
    penalties = {"repeat_penalty": 2, "repetition_penalty": 3}
    response = notes.http.post(f"/v1/{path}", json={**body, **penalties, "metadata": {"interaction_id": id}})
    assert known(response) == (id, id)


def test_an_error_of_an_unrecorded_request_has_no_interaction(notes):
    body = {"model": "notes", "input": "x", "store": False, "previous_response_id": "x"}
    request, interaction = known(notes.http.post("/v1/responses", json=body))
    assert UUID(request) and interaction is None


def test_a_missing_key_and_a_taken_id_return_the_id(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))  # once a home has keys, every request needs one
    key = create_key(connect(), "errors", ["infer"])
    with serving(make_loop("keyed")) as gateway:
        id = str(uuid4())
        body = {"model": "keyed", "messages": [USER], "max_tokens": 2}
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {key}"}, 200)):
            headers = {HEADER: id, **headers}
            response = gateway.http.post("/v1/chat/completions", json=body, headers=headers)
            assert (response.status_code, known(response)) == (status, (id, id))
        response = gateway.http.post("/v1/chat/completions", json={**body, "seed": 1}, headers=headers)
        assert (response.status_code, known(response)) == (409, (id, id))


def test_two_different_ids_are_refused(notes):
    response = send(notes, uuid4(), metadata={"interaction_id": str(uuid4())})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata.interaction_id")
    id = str(uuid4())
    assert send(notes, id, metadata={"interaction_id": id}).status_code == 200


@pytest.mark.parametrize("in_header", [True, False], ids=["header", "metadata"])
@pytest.mark.parametrize("drained", [True, False], ids=["stored", "in the write-ahead log"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_request_again_gets_the_recorded_answer(notes, in_header, drained, stream):
    id, answered = uuid4(), notes.metric("finetune_answers_total")
    if drained:
        first = send(notes, id, in_header, stream=stream)
        assert notes.interaction(str(id))
        again = [send(notes, id, in_header, stream=stream) for _ in range(2)]
    else:
        with store_stopped(notes):
            first = send(notes, id, in_header, stream=stream)
            again = [send(notes, id, in_header, stream=stream) for _ in range(2)]
    assert {content(one) for one in again} == {content(first)}
    assert notes.metric("finetune_answers_total") == answered + 1
    if not stream:
        assert "idempotent-replayed" not in first.headers
        assert {one.headers["idempotent-replayed"] for one in again} == {"true"}
        fields = ("id", "model", "usage", "confidence", "seed")
        assert all(one.json()[field] == first.json()[field] for one in again for field in fields)
    assert notes.interaction(str(id))["interaction"]["output"] == content(first)


def test_simultaneous_retries_are_answered_once(notes):
    id, answered = uuid4(), notes.metric("finetune_answers_total")
    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(lambda _: content(send(notes, id)), range(8)))
    assert len(texts) == 1
    assert notes.metric("finetune_answers_total") == answered + 1


def test_a_retry_after_a_disconnect_is_answered_and_recorded(own_home):
    with serving(make_loop(serving={"parallel": 1})) as running:
        id = uuid4()
        fields = {"messages": [USER], "guided_json": LONG, "max_tokens": 400}
        raw = running.http.build_request(
            "POST", "/v1/chat/completions", json={"model": "notes", **fields}, headers={HEADER: str(id)}
        )
        host, port = running.url.removeprefix("http://").split(":")
        lines = [f"{name}: {value}" for name, value in raw.headers.items()]
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""]).encode() + raw.content
            )
            wait_until(lambda: running.metric("finetune_in_flight", loop="notes") == 1)
        again = running.http.send(
            running.http.build_request(
                "POST", "/v1/chat/completions", json={"model": "notes", **fields}, headers={HEADER: str(id)}
            )
        )
        assert content(again) == running.interaction(str(id))["interaction"]["output"]
        assert running.metric("finetune_answers_total") == 1


@pytest.mark.parametrize("drained", [True, False], ids=["stored", "in the write-ahead log"])
@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{**USER, "content": "another prompt"}]},
        {"max_tokens": 21},
        {"stream": True},
        {"path": "completions"},
        {"n": 2},
        {"top_a": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_an_id_of_another_request_is_refused(notes, drained, other):
    id = uuid4()
    if drained:
        first = send(notes, id)
        notes.interaction(str(id))
        second = send(notes, id, **other)
    else:
        with store_stopped(notes):
            first, second = send(notes, id), send(notes, id, **other)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "id_taken")
    assert notes.interaction(str(id))["interaction"]["output"] == content(first)


def test_an_id_that_a_request_in_progress_has_is_refused(own_home):
    with serving(make_loop()) as running, ThreadPoolExecutor(1) as pool:
        id = uuid4()
        long = pool.submit(send, running, id, guided_json=LONG, max_tokens=400)
        wait_until(lambda: running.metric("finetune_in_flight", loop="notes") == 1)
        assert send(running, id).status_code == 409
        assert content(long.result())


def test_an_id_of_a_loop_that_is_not_served_is_refused_and_nothing_of_it_is_found(notes):
    id, answer = uuid4(), {"model": "others", "input": PROMPT, "max_output_tokens": 4}
    with serving(make_loop("others")) as others:
        assert others.http.post("/v1/responses", json=answer, headers={HEADER: str(id)}).status_code == 200
    refused = send(notes, id)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "id_taken")
    assert notes.http.get(f"/v1/responses/{id}").status_code == 404
    continued = {**answer, "model": "notes", "previous_response_id": str(id)}
    assert notes.http.post("/v1/responses", json=continued).status_code == 400


def test_an_id_of_an_interaction_from_elsewhere_is_refused(notes):
    id = str(uuid4())
    notes.http.post("/v1/interactions", json={"id": id, "loop": "notes", "prompt": PROMPT, "output": "{}"})
    assert send(notes, id).status_code == 409
    new = notes.ask(max_tokens=2).json()["id"]
    assert send(notes, new).status_code == 409


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_replayed_together(notes, stream):
    id, answered = uuid4(), notes.metric("finetune_answers_total")
    first, again = (send(notes, id, n=3, stream=stream) for _ in range(2))
    parts = []
    for response in (first, again):
        texts = {}
        for choice in (c for chunk in (events(response) if stream else [response.json()]) for c in chunk["choices"]):
            part = choice.get("delta") or choice.get("message") or {}
            texts[choice["index"]] = texts.get(choice["index"], "") + (part.get("content") or "")
        parts.append(texts)
    assert parts[0] == parts[1]
    assert len(parts[0]) == 3
    assert notes.metric("finetune_answers_total") == answered + 3


def test_a_tool_call_is_replayed_with_its_id(notes):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
    id = uuid4()
    first, again = (send(notes, id, **tools).json()["choices"][0] for _ in range(2))
    assert first["message"] == again["message"]
    assert first["message"]["tool_calls"][0]["id"] == f"call_{id.hex}"


def test_the_end_of_the_answer_is_replayed(notes):
    id = uuid4()
    assert [send(notes, id, max_tokens=2).json()["choices"][0]["finish_reason"] for _ in range(2)] == ["length"] * 2


def test_a_replayed_continuation_does_not_repeat_its_beginning(notes):
    id, begun = uuid4(), [USER, {"role": "assistant", "content": '{"element'}]
    assert len({content(send(notes, id, messages=begun)) for _ in range(2)}) == 1


def test_an_id_of_another_api_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))  # once a home has keys, every request needs one
    without_key = uuid4()
    with serving(make_loop()) as running:
        assert send(running, without_key).status_code == 200
    keys = [create_key(connect(), name, ["infer", "feedback"]) for name in ("one", "local")]
    with serving(make_loop()) as running:
        id = uuid4()
        one, two = ({"Authorization": f"Bearer {key}"} for key in keys)
        assert send(running, id, headers=one).status_code == 200
        assert send(running, id, headers=one).status_code == 200
        assert send(running, id, headers=two).status_code == 409
        # What was sent before there were keys belongs to none, not even to one named "local".
        assert send(running, without_key, headers=two).status_code == 409


def test_the_official_clients_extra_headers_and_metadata_choose_the_id(notes):
    client, ids = notes.openai(), [str(uuid4()), str(uuid4())]
    fields = {"model": "notes", "messages": [USER], "max_tokens": 4}
    one = client.chat.completions.create(**fields, extra_headers={HEADER: ids[0]})
    two = client.chat.completions.create(**fields, metadata={"interaction_id": ids[1], "ticket": "7"})
    assert [one.id, two.id] == ids
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(**{**fields, "max_tokens": 5}, extra_headers={HEADER: ids[0]})


def test_metadata_is_recorded(notes):
    answer = notes.ask(max_tokens=2, metadata={"ticket": "7", "tries": 2, "domain": "walls"}).json()
    kept = notes.interaction(answer["id"])["interaction"]
    assert (kept["metadata"], kept["domain"]) == ({"ticket": "7", "tries": 2}, "walls")


@pytest.mark.parametrize(
    ("path", "fields"),
    [("chat/completions", {"messages": [USER]}), ("completions", {"prompt": PROMPT}), ("responses", {"input": PROMPT})],
)
def test_the_gateways_key_of_the_metadata_is_refused(notes, path, fields):
    response = notes.http.post(f"/v1/{path}", json={"model": "notes", "metadata": {"gateway": {"x": 1}}, **fields})
    assert response.status_code == 400
    assert (response.json()["error"]["param"], "reserved for the gateway" in response.text) == ("metadata", True)


@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"safety_identifier": "hash-1"}, "hash-1"),
        ({"safety_identifier": "hash-1", "user": "ada"}, "ada"),
        ({"safety_identifier": None, "user": None}, None),
    ],
)
def test_the_safety_identifier_is_recorded_as_the_user(notes, fields, user):
    answer = notes.ask(max_tokens=2, **fields).json()
    assert notes.interaction(answer["id"])["interaction"]["user"] == user


def test_feedback_on_an_unknown_id_says_so(notes):
    unknown = str(uuid4())
    receipt = notes.http.post("/v1/feedback", json={"interaction_id": unknown, "kind": "thumbs_up"}).json()
    assert receipt["status"] == "unmatched"
    assert f"There is no interaction {unknown} yet" in receipt["message"]
    known = notes.ask(max_tokens=2).json()["id"]
    receipt = notes.http.post("/v1/feedback", json={"interaction_id": known, "kind": "thumbs_up"}).json()
    assert (receipt["status"], "message" in receipt) == ("recorded", False)
