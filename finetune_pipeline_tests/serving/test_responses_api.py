"""OpenAI's Responses API: with the official client, and over HTTP where it hides something."""

import json
from uuid import UUID, uuid4

import openai
import pytest
import sqlalchemy as sa
from openai.types.responses import Response, ResponseErrorEvent
from pydantic import BaseModel, TypeAdapter

from finetune_pipeline.database import connect, tables
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.feedback.erasure import erase_user
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline_tests.serving.conftest import LONG, PROMPT, make_loop, serving
from finetune_pipeline_tests.serving.test_interaction_ids import store_stopped

PARAMETERS = {
    "type": "object",
    "properties": {"element": {"enum": ["wall"]}, "thickness_mm": {"type": "integer", "minimum": 1, "maximum": 999}},
    "required": ["element", "thickness_mm"],
    "additionalProperties": False,
}
WALL = {"type": "function", "name": "add_wall", "description": "Add.", "parameters": PARAMETERS, "strict": True}
DOOR = {"type": "function", "name": "add_door"}
NAMED = {"type": "function", "name": "add_wall"}
FORMAT = {"format": {"type": "json_schema", "name": "wall", "schema": PARAMETERS, "strict": True}}
USER = {"role": "user", "content": PROMPT}


class Wall(BaseModel):
    """A wall."""

    element: str
    thickness_mm: int


def create(running, input=PROMPT, **fields):
    """Create a response with the official client."""
    return running.openai().responses.create(**{"model": "notes", "input": input, "max_output_tokens": 24, **fields})


def post(running, **fields):
    """Send a request over HTTP."""
    body = {"model": "notes", "input": PROMPT, "max_output_tokens": 24, **fields}
    return running.http.post("/v1/responses", json=body)


def streamed(running, **fields):
    """Return the events of a stream, each validated as the official client's type for it."""
    events = list(create(running, stream=True, **fields))
    union = TypeAdapter(openai.types.responses.ResponseStreamEvent)
    for event in events:
        union.validate_python(event.to_dict())
    return events


def recorded(running, id):
    """Return the recorded interaction."""
    return running.interaction(id)["interaction"]


# ---- one response


@pytest.mark.parametrize("role", ["user", "developer", "system"])
@pytest.mark.parametrize("form", ["text", "parts"])
@pytest.mark.parametrize("typed", [True, False])
def test_the_answer_is_that_of_chat_completions(notes, role, form, typed):
    messages = [USER] if role == "user" else [{"role": role, "content": "Answer in JSON."}, USER]
    chat = notes.ask_all(messages, max_tokens=24)
    input = [
        {
            **({"type": "message"} if typed else {}),
            "role": message["role"],
            "content": message["content"]
            if form == "text"
            else [
                {"type": "input_text", "text": message["content"][:9]},
                {"type": "input_text", "text": message["content"][9:]},
            ],
        }
        for message in messages
    ]
    response = create(notes, input)
    assert response.output_text == chat["choices"][0]["message"]["content"] != ""
    assert response.model == chat["model"]
    assert response.confidence == pytest.approx(chat["confidence"], abs=1e-3)


def test_the_body_is_complete(notes):
    raw = post(
        notes,
        instructions="Be brief.",
        metadata={"ticket": "7", "domain": "walls"},
        user="ada",
        temperature=0.7,
        top_p=0.9,
        seed=5,
        reasoning={"effort": "low"},
        truncation="auto",
        service_tier="auto",
        include=["reasoning.encrypted_content"],
    )
    body = raw.json()
    Response.model_validate(body)
    usage = body["usage"]
    assert usage["input_tokens"] > 0 < usage["output_tokens"] <= 24
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    expected = {
        "object": "response",
        "error": None,
        "instructions": "Be brief.",
        "metadata": {"ticket": "7", "domain": "walls"},
        "user": "ada",
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "store": True,
        "max_output_tokens": 24,
        "previous_response_id": None,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
    }
    assert {name: body[name] for name in expected} == expected
    assert float(raw.headers["x-confidence"]) == pytest.approx(body["confidence"], abs=1e-4)
    assert "x-ignored-fields" not in raw.headers
    kept = recorded(notes, body["id"])
    assert (kept["user"], kept["domain"], kept["seed"], kept["metadata"]["ticket"]) == ("ada", "walls", 5, "7")
    assert kept["history"] == [{"role": "system", "content": "Be brief."}]


def test_the_id_is_the_interactions_and_feedback_accepts_it(notes):
    raw = post(notes)
    body = raw.json()
    id = body["id"]
    assert id == raw.headers["x-interaction-id"] == raw.headers["x-request-id"]
    assert body["output"][0]["id"] == f"msg_{UUID(id).hex}"
    receipt = notes.http.post("/v1/feedback", json={"interaction_id": id, "kind": "thumbs_up"}).json()
    assert receipt["status"] == "recorded"
    assert recorded(notes, id)["output"] == body["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("in_header", [True, False], ids=["header", "metadata"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_can_choose_the_id_and_send_the_request_again(notes, in_header, stream):
    id, answered = str(uuid4()), notes.metric("finetune_answers_total")
    chosen = {"extra_headers": {"X-Interaction-Id": id}} if in_header else {"metadata": {"interaction_id": id}}
    both = [create(notes, stream=stream, temperature=1.5, **chosen) for _ in range(2)]
    one, two = (list(response)[-1].response for response in both) if stream else both
    assert (one.id, two.id, one.output_text) == (id, id, two.output_text)
    assert notes.metric("finetune_answers_total") == answered + 1
    with pytest.raises(openai.ConflictError):
        create(notes, "another", **chosen)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(notes, stream):
    fields = {"guided_json": LONG, "max_output_tokens": 3}
    if stream:
        last = streamed(notes, extra_body={"guided_json": LONG}, max_output_tokens=3)[-1]
        assert last.type == "response.incomplete"
        body = last.response.to_dict()
    else:
        body = post(notes, **fields).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(
    "text", [FORMAT, {"format": {"type": "json_object", "schema": PARAMETERS}}], ids=["schema", "object"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_constrains_the_answer(notes, text, stream):
    response = streamed(notes, text=text)[-1].response if stream else create(notes, text=text)
    assert Wall.model_validate_json(response.output_text).element == "wall"
    assert response.text.format.type == text["format"]["type"]


def test_the_official_clients_parse_and_stream(notes):
    client = notes.openai()
    parsed = client.responses.parse(model="notes", input=PROMPT, text_format=Wall, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Wall)
    with client.responses.stream(model="notes", input=PROMPT, text_format=Wall, max_output_tokens=60) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    assert (final.confidence, final.seed) == (pytest.approx(parsed.confidence, abs=1e-3), None)


def test_a_stream_has_the_events_of_a_message(notes):
    events = streamed(notes)
    types = [event.type for event in events]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    if types[-1] == "response.incomplete":
        tail[-1] = "incomplete"
    assert types[:4] == [f"response.{name}" for name in head]
    assert types[-4:] == [f"response.{name}" for name in tail]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events[4:-4])
    final = events[-1].response
    assert text == events[-4].text == events[-3].part.text == final.output_text == create(notes).output_text
    assert len({event.item_id for event in events[3:-2]} | {events[2].item.id, final.output[0].id}) == 1
    assert events[0].response.output == [] and events[0].response.id == final.id
    assert recorded(notes, final.id)["output"] == text


def test_a_stream_over_http_names_each_event(notes):
    raw = post(notes, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in raw.text.strip().split("\n\n")]
    for event, data in blocks:
        assert json.loads(data.removeprefix("data: "))["type"] == event.removeprefix("event: ")
    id = json.loads(blocks[0][1].removeprefix("data: "))["response"]["id"]
    assert id == raw.headers["x-interaction-id"] == raw.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_included_on_request(notes, stream):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain = create(notes)
    assert plain.output[0].content[0].logprobs == []
    if stream:
        events = streamed(notes, **fields)
        response = events[-1].response
        deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        assert "".join(one.token for one in deltas) == response.output_text
    else:
        response = create(notes, **fields)
    logprobs = response.output[0].content[0].logprobs
    assert "".join(one.token for one in logprobs) == response.output_text == plain.output_text
    assert {len(one.top_logprobs) for one in logprobs} == {2}


# ---- tools


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WALL], "tool_choice": NAMED},
        {"tools": [DOOR, WALL], "tool_choice": NAMED, "parallel_tool_calls": False},
        {"tools": [WALL], "tool_choice": "required"},
    ],
    ids=["named", "named of two", "required"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called(notes, fields, stream):
    if stream:
        events = streamed(notes, **fields)
        types = [event.type.removeprefix("response.") for event in events]
        assert types[:3] == ["created", "in_progress", "output_item.added"]
        assert types[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        assert set(types[3:-3]) == {"function_call_arguments.delta"}
        assert "".join(event.delta for event in events[3:-3]) == events[-3].arguments
        assert (events[2].item.name, events[2].item.arguments) == ("add_wall", "")
        response = events[-1].response
    else:
        response = create(notes, **fields)
    [call] = response.output
    id = UUID(response.id).hex
    assert (call.type, call.name, call.status) == ("function_call", "add_wall", "completed")
    assert (call.id, call.call_id) == (f"fc_{id}", f"call_{id}")
    assert Wall.model_validate_json(call.arguments)
    assert recorded(notes, response.id)["output"] == call.arguments


@pytest.mark.parametrize(
    "fields", [{"tools": [WALL, DOOR], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {"tools": None}]
)
def test_without_a_tool_to_choose_the_answer_is_text(notes, fields):
    assert post(notes, **fields).json()["output"][0]["content"][0]["text"] == create(notes).output_text


# ---- what is not supported


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tools": [WALL]}, "tool_choice", "'auto' .* is not supported yet, use response_format .here: text.format"),
        ({"tools": [WALL, DOOR], "tool_choice": "required"}, "tool_choice", "is not supported yet"),
        ({"tools": [DOOR], "tool_choice": NAMED}, "tool_choice", "names the function 'add_wall', but .* add_door"),
        ({"tool_choice": "required"}, "tool_choice", "needs a function in tools"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "web_search_preview"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "built-in tools are not supported"),
        ({"tools": [{"type": "mcp", "server_label": "a"}]}, "tools[0]", "built-in tools are not supported"),
        ({"background": True}, "background", "background responses are not supported"),
        ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "stored prompts are not supported"),
        ({"input": []}, "input", "is empty"),
        ({"input": [{"role": "assistant", "content": "{"}]}, "input", "must be a user's message"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing in a message"),
        ({"input": [{"content": "x"}]}, "input[0].role", "is missing in a message"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id", "is missing in a reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
            "input[0].content[0].type",
            "only text is supported",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
            "only text is supported",
        ),
        (
            {"input": [USER, {"type": "function_call_output", "call_id": "c", "output": "7"}, USER]},
            "input[1].type",
            "earlier tool calls are not supported yet",
        ),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}, USER]}, "input[0].type", "reasoning"),
        ({"input": [{"type": "item_reference", "id": f"fc_{uuid4().hex}"}, USER]}, "input", "earlier tool calls"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, None, "not"),
        ({"input": PROMPT * 400}, None, "maximum context length is 512 tokens"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused(notes, fields, param, reason, stream):
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        fields = dict(fields)
        create(notes, fields.pop("input", PROMPT), stream=stream, extra_body=fields)
    assert refused.value.param == param


def test_unknown_fields_are_named_and_other_models_are_not_found(notes):
    raw = post(notes, top_a=1, input=[{**USER, "cache_control": {}}], text={"new": 1})
    assert raw.status_code == 200
    assert set(raw.headers["x-ignored-fields"].split(", ")) == {"top_a", "input.cache_control", "text.new"}
    assert post(notes, model="nobody").json()["error"]["code"] == "model_not_found"


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(notes):
    # That the items are unique is checked on the complete answer.
    equal = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    raw = post(notes, stream=True, guided_json=equal)
    blocks = raw.text.strip().split("\n\n")
    event, data = blocks[-1].split("\n")
    body = json.loads(data.removeprefix("data: "))
    assert (raw.status_code, event, body["sequence_number"]) == (200, "event: error", len(blocks) - 1)
    ResponseErrorEvent.model_validate(body)
    assert body["error"]["message"] == body["message"]
    assert "violates uniqueItems" in body["message"]
    with pytest.raises(openai.APIError, match="violates uniqueItems"):
        list(create(notes, stream=True, extra_body={"guided_json": equal}))


@pytest.mark.parametrize("path", ["/v1/responses", "/responses"])
def test_the_path_may_lack_its_version(notes, path):
    id = notes.http.post(path, json={"model": "notes", "input": PROMPT, "max_output_tokens": 2}).json()["id"]
    assert notes.http.get(f"{path}/{id}").json()["id"] == id


# ---- the store


@pytest.mark.parametrize("drained", [True, False], ids=["stored", "in the write-ahead log"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_continues_after_its_previous_response(notes, drained, stream):
    def chain():
        one = create(notes, instructions="Answer in JSON.")
        if drained:
            recorded(notes, one.id)
        two = create(notes, "And a door", previous_response_id=one.id, instructions="Answer in one word.")
        last = create(notes, [{"role": "user", "content": "A roof"}], previous_response_id=two.id, stream=stream)
        return one, two, list(last)[-1].response if stream else last

    if drained:
        one, two, three = chain()
    else:
        with store_stopped(notes):
            one, two, three = chain()
    first = [USER, {"role": "assistant", "content": one.output_text}]
    door = [{"role": "user", "content": "And a door"}, {"role": "assistant", "content": two.output_text}]
    # The instructions of earlier responses are not carried over.
    assert recorded(notes, two.id)["history"] == [{"role": "system", "content": "Answer in one word."}, *first]
    assert recorded(notes, three.id)["history"] == [*first, *door]
    assert three.previous_response_id == two.id
    chat = notes.ask_all([*first, *door, {"role": "user", "content": "A roof"}], max_tokens=24)
    assert three.output_text == chat["choices"][0]["message"]["content"]


def test_instructions_that_are_the_loops_own_prompt_and_other_system_messages_stay_in_place(notes):
    one = create(notes, [{"role": "developer", "content": "Metric."}, USER], instructions="Parse the request.")
    two = create(notes, "And a door", previous_response_id=one.id)
    assert [turn["role"] for turn in recorded(notes, two.id)["history"]] == ["system", "user", "assistant"]
    assert recorded(notes, two.id)["history"][0]["content"] == "Metric."


@pytest.mark.parametrize("sent_back", ["items", "references"])
def test_earlier_output_items_can_be_sent_back(notes, sent_back):
    one = create(notes, include=["message.output_text.logprobs"])
    items = [item.to_dict() for item in one.output]
    if sent_back == "references":
        items = [{"type": "item_reference", "id": item["id"]} for item in items]
    two = create(notes, [USER, *items, {"role": "user", "content": "And a door"}])
    assert recorded(notes, two.id)["history"] == [USER, {"role": "assistant", "content": one.output_text}]


@pytest.mark.parametrize("drained", [True, False], ids=["stored", "in the write-ahead log"])
@pytest.mark.parametrize("fields", [{}, {"tools": [WALL], "tool_choice": "required"}], ids=["text", "tool"])
def test_a_response_can_be_retrieved(notes, drained, fields):
    fields |= {"instructions": "Be brief.", "metadata": {"ticket": "7", "kind": "new"}, "user": "ada"}
    if drained:
        one = create(notes, **fields)
        recorded(notes, one.id)
        again = notes.openai().responses.retrieve(one.id)
    else:
        with store_stopped(notes):
            one = create(notes, **fields)
            again = notes.openai().responses.retrieve(one.id)
    Response.model_validate(again.to_dict())
    same = ("id", "created_at", "status", "model", "output", "usage", "instructions", "metadata", "user", "confidence")
    assert {name: getattr(again, name) for name in same} == {name: getattr(one, name) for name in same}


@pytest.mark.parametrize("stream", [False, True])
def test_with_store_false_nothing_is_recorded(notes, stream):
    def count():
        with connect().read() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(tables.interactions)).scalar_one()

    notes.interaction(notes.ask(max_tokens=2).json()["id"])  # all earlier events are in the store now
    before, log = count(), notes.gateway.recorder.path.read_bytes()
    raw = post(notes, store=False, stream=stream)
    id = raw.headers["x-request-id"]
    assert id in raw.text and "x-interaction-id" not in raw.headers
    assert '"store":false' in raw.text.replace(" ", "")
    assert (count(), notes.gateway.recorder.path.read_bytes()) == (before, log)
    assert notes.http.get(f"/v1/interactions/{id}").status_code == 404
    assert notes.http.get(f"/v1/responses/{id}").status_code == 404
    with pytest.raises(openai.BadRequestError, match="not found"):
        create(notes, previous_response_id=id)
    receipt = notes.http.post("/v1/feedback", json={"interaction_id": id, "kind": "thumbs_up"}).json()
    assert receipt["status"] == "unmatched"


def assert_not_found(running, id, **fields):
    """Check that a response is found in no way."""
    responses = running.openai(**fields).responses
    with pytest.raises(openai.BadRequestError, match=f"Previous response with id '{id}' not found") as refused:
        responses.create(model="notes", input=PROMPT, previous_response_id=id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(id)
    item = {"type": "item_reference", "id": f"msg_{id.replace('-', '')}"}
    with pytest.raises(openai.NotFoundError, match="Item with id"):
        responses.create(model="notes", input=[item, USER])


@pytest.mark.parametrize("id", ["resp_123", str(uuid4()), "x" * 150], ids=["another form", "unknown", "long"])
def test_an_unknown_response_is_not_found(notes, id):
    assert_not_found(notes, id)


def test_interactions_of_other_routes_are_not_responses(notes):
    assert_not_found(notes, notes.ask(max_tokens=2).json()["id"])


@pytest.mark.parametrize(
    "gateway", [None, 7, {"api": 1}, {"api": "responses"}, {"api": "responses", "key": None, "function": 1}], ids=str
)
def test_interactions_with_other_metadata_are_not_responses(notes, gateway):
    id = str(uuid4())
    event = {"id": id, "loop": "notes", "prompt": PROMPT, "output": "{}"}
    assert notes.http.post("/v1/interactions", json=event).status_code == 200
    recorded(notes, id)
    interactions = tables.interactions
    with connect().write() as connection:  # files of events may have any metadata
        connection.execute(interactions.update().where(interactions.c.id == id).values(metadata={"gateway": gateway}))
    assert_not_found(notes, id)


def test_a_previous_response_that_is_a_tool_call_is_refused(notes):
    one = create(notes, tools=[WALL], tool_choice="required")
    with pytest.raises(openai.BadRequestError, match=r"call of the function 'add_wall'.* not supported yet"):
        create(notes, previous_response_id=one.id)


def test_an_erased_response_is_not_found(notes):
    one = create(notes, user="ada to erase")
    recorded(notes, one.id)
    loop = make_loop()
    with connect().write() as connection:
        erase_user(connection, loop.name, "ada to erase", reward_function(loop.feedback))
    assert_not_found(notes, one.id)


@pytest.mark.parametrize(("history", "status"), [("{", 500), ("null", 200)])
def test_a_damaged_response_is_not_reported_as_unknown(notes, history, status):
    one = create(notes)
    recorded(notes, one.id)
    with connect().write() as connection:
        update = sa.text("UPDATE interactions SET history = :history WHERE id = :id")
        connection.execute(update, {"history": history, "id": one.id})
    assert notes.http.get(f"/v1/responses/{one.id}").status_code == status


@pytest.mark.parametrize("query", ["?stream=true", "?stream=maybe"])
def test_a_recorded_response_is_not_streamed(notes, query):
    one = create(notes)
    assert notes.http.get(f"/v1/responses/{one.id}{query}").status_code == 400


def test_responses_of_another_key_are_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))  # once a home has keys, every request needs one
    with serving(make_loop()) as running:
        without_key = create(running).id
    secrets = [create_key(connect(), name, ["infer", "feedback"]) for name in ("one", "local")]
    with serving(make_loop()) as running:
        fields = {"model": "notes", "input": PROMPT, "max_output_tokens": 8}
        one, two = (running.openai(api_key=secret).responses for secret in secrets)
        mine = one.create(**fields)
        for state in ("in the write-ahead log", "stored"):
            if state == "in the write-ahead log":
                with store_stopped(running):
                    mine = one.create(**fields)
                    assert one.create(**fields, previous_response_id=mine.id).previous_response_id == mine.id
                    assert_not_found(running, mine.id, api_key=secrets[1])
            else:
                running.gateway.recorder.wait(60)
                assert one.retrieve(mine.id).output_text == mine.output_text
                assert_not_found(running, mine.id, api_key=secrets[1])
        # What was sent before there were keys belongs to none, not even to one named "local".
        for secret in secrets:
            assert_not_found(running, without_key, api_key=secret)
        assert two.create(**fields).id
        with pytest.raises(openai.AuthenticationError):
            running.openai(api_key="wrong").responses.retrieve(mine.id)
