"""The unmodified OpenAI client, and the interactions that are recorded."""

import json
import math

import openai
import pytest
from pydantic import BaseModel

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline_tests.serving.conftest import PROMPT, events, make_loop, serving

SYSTEM = {"role": "system", "content": "Parse the request."}
USER = {"role": "user", "content": PROMPT}


class Wall(BaseModel):
    element: str
    thickness_mm: int


@pytest.fixture(scope="module")
def engine(ggufs):
    """Return an engine with the model that the gateway serves."""
    with Engine(ModelSpec(gguf=ggufs["F16"], context=512)) as opened:
        yield opened


def without_gateway(engine, *messages, **fields):
    [answer] = engine.generate([GenerateRequest(messages=list(messages), max_tokens=64, **fields)])
    return answer


def test_a_chat_is_answered_as_without_the_gateway(notes, engine):
    answer = notes.openai().chat.completions.create(model="notes", messages=[USER])
    direct = without_gateway(engine, SYSTEM, USER)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", direct.text, "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (direct.prompt_tokens, len(direct.token_ids))
    assert (answer.model, answer.object) == ("notes@base", "chat.completion")


def test_a_stream_has_the_same_answer_in_deltas(notes):
    client = notes.openai()
    complete = client.chat.completions.create(model="notes", messages=[USER], logprobs=True)
    options = {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="notes", messages=[USER], **options))
    deltas = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(deltas) > 5
    assert "".join(deltas) == complete.choices[0].message.content
    assert (chunks[0].choices[0].delta.role, chunks[-2].choices[0].finish_reason) == ("assistant", "stop")
    assert chunks[-1].usage == complete.usage
    tokens = [token.token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
              for token in chunk.choices[0].logprobs.content]  # fmt: skip
    assert tokens == [token.token for token in complete.choices[0].logprobs.content]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"notes@base"}


def test_logprobs_are_those_of_the_models_tokens(notes, engine):
    answer = notes.openai().chat.completions.create(model="notes", messages=[USER], logprobs=True)
    tokens = answer.choices[0].logprobs.content
    direct = without_gateway(engine, SYSTEM, USER)
    assert [token.token for token in tokens] == direct.token_texts
    assert [token.logprob for token in tokens] == pytest.approx(direct.token_logprobs, rel=1e-3, abs=1e-4)
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == answer.choices[0].message.content


def test_parse_returns_an_object_of_the_clients_class(notes):
    parsed = notes.openai().chat.completions.parse(model="notes", messages=[USER], response_format=Wall)
    assert isinstance(parsed.choices[0].message.parsed, Wall)


def test_a_json_schema_constrains_the_answer(notes):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    complete = notes.ask("what is the weather", response_format=form)
    assert json.loads(complete.json()["choices"][0]["message"]["content"]) == {"n": 7}
    stream = events(notes.ask("what is the weather", response_format=form, stream=True))
    assert json.loads("".join(event["choices"][0]["delta"].get("content", "") for event in stream)) == {"n": 7}


def test_json_object_returns_an_object(notes):
    answer = notes.ask("hello", response_format={"type": "json_object"}, max_tokens=128)
    assert answer.json()["choices"][0]["message"]["content"].startswith("{")


def test_completions_send_the_prompt_as_a_user_message(notes):
    client = notes.openai()
    chat = client.chat.completions.create(model="notes", messages=[USER])
    complete = client.completions.create(model="notes", prompt=PROMPT)
    assert complete.choices[0].text == chat.choices[0].message.content
    deltas = client.completions.create(model="notes", prompt=[PROMPT], stream=True)
    assert "".join(delta.choices[0].text for delta in deltas) == complete.choices[0].text


def test_an_answer_ends_at_a_stop_text_and_at_max_tokens(notes):
    client = notes.openai()
    stopped = client.chat.completions.create(model="notes", messages=[USER], stop=["brick"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.endswith('"material":"')
    cut = client.chat.completions.create(model="notes", messages=[USER], max_completion_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)


def test_the_same_seed_gives_the_same_answer(notes):
    client = notes.openai()
    draw = [
        client.chat.completions.create(model="notes", messages=[USER], temperature=2, seed=seed, max_tokens=30)
        for seed in (1, 1, 2)
    ]
    texts = [answer.choices[0].message.content for answer in draw]
    assert texts[0] == texts[1] != texts[2]
    assert [answer.seed for answer in draw] == [1, 1, 2]


def sampled(notes, path, stream, **fields):
    """Return an answer, its seed in the response, and its seed in the store."""
    what = {"messages": [USER]} if path == "chat/completions" else {"prompt": PROMPT}
    body = {"model": "notes", "temperature": 2, "max_tokens": 30, "stream": stream, **what, **fields}
    response = notes.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    last = events(response)[-1] if stream else response.json()
    kept = notes.interaction(response.headers["x-interaction-id"])["interaction"]
    return kept["output"], last["seed"], kept["seed"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("fields", [{}, {"seed": None}, {"seed": -1}])
def test_without_a_seed_a_random_one_is_recorded_and_returned(notes, path, stream, fields):
    text, seed, kept = sampled(notes, path, stream, **fields)
    other_text, other_seed, _ = sampled(notes, path, stream, **fields)
    assert kept == seed != other_seed
    assert text != other_text
    assert sampled(notes, path, stream, seed=seed) == (text, seed, seed)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 2])
def test_every_valid_seed_is_reproducible(notes, seed):
    assert sampled(notes, "completions", False, seed=seed) == sampled(notes, "completions", False, seed=seed)


@pytest.mark.parametrize("fields", [{}, {"seed": 3}, {"seed": -1}])
def test_at_temperature_0_there_is_no_seed(notes, fields):
    first, again = (sampled(notes, "chat/completions", False, temperature=0, **fields) for _ in range(2))
    assert first == again
    assert first[1:] == (None, None)


def test_models_are_listed_and_retrieved(notes):
    client = notes.openai()
    assert [model.id for model in client.models.list()] == ["notes"]
    assert client.models.retrieve("notes").serving == "notes@base"
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'gpt-4'\. There are: notes"):
        client.models.retrieve("gpt-4")


def test_errors_raise_the_clients_exceptions(notes):
    client = notes.openai()
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4'") as missing:
        client.chat.completions.create(model="gpt-4", messages=[USER])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="n: a value above 64 is not supported"):
        client.chat.completions.create(model="notes", messages=[USER], n=65)


LONG_MESSAGES = [
    {"messages": [{"role": "user", "content": "wall " * 2_000}]},
    {"messages": [{"role": "user", "content": "wall " * 200_000}]},  # refused by its bytes, without its tokens
    {"messages": [{"role": "user", "content": "wall"}, {"role": "assistant", "content": "wall " * 2_000}]},
    {"prompt": "wall " * 2_000},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", LONG_MESSAGES, ids=["tokens", "bytes", "prefill", "completions"])
def test_a_prompt_beyond_the_context_has_openais_code(notes, given, stream):
    client = notes.openai()
    create = client.chat.completions.create if "messages" in given else client.completions.create
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 512 tokens") as refused:
        list(create(model="notes", stream=stream, **given))
    assert refused.value.code == "context_length_exceeded"
    assert "serving.context" in refused.value.message


def test_an_interaction_is_recorded_with_all_its_fields(notes):
    raw = notes.openai().chat.completions.with_raw_response.create(
        model="notes",
        messages=[USER],
        user="ada",
        metadata={"domain": "walls", "kind": "parse", "retrieved_context": "brick is 115 mm", "ticket": "7"},
    )
    answer = raw.parse()
    assert raw.headers["x-interaction-id"] == answer.id
    found = notes.interaction(answer.id)
    kept = found["interaction"]
    assert (kept["prompt"], kept["output"]) == (PROMPT, answer.choices[0].message.content)
    assert (kept["model"], kept["variant"], kept["user"]) == ("notes@base", "champion", "ada")
    assert (kept["domain"], kept["kind"], kept["retrieved_context"]) == ("walls", "parse", "brick is 115 mm")
    assert (kept["prompt_tokens"], kept["completion_tokens"]) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    assert 0 < kept["latency_ms"] < 60_000
    assert kept["confidence"] == answer.confidence == pytest.approx(float(raw.headers["x-confidence"]), abs=1e-4)
    assert (found["feedback"], found["reward"], found["target"]) == ([], None, None)


def test_a_stream_is_recorded_before_it_ends(notes):
    with notes.openai().chat.completions.with_streaming_response.create(
        model="notes", messages=[USER], stream=True
    ) as raw:
        chunks = list(raw.parse())
    assert {chunk.id for chunk in chunks} == {raw.headers["x-interaction-id"]}
    kept = notes.interaction(chunks[0].id)["interaction"]
    assert kept["output"] == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert kept["confidence"] == chunks[-1].confidence


def test_answers_below_the_confidence_threshold_are_flagged(notes, engine):
    flagged, stats = notes.metric("finetune_flagged_total"), notes.http.get("/v1/feedback/stats").json()
    unsure = notes.ask(PROMPT).json()
    direct = without_gateway(engine, SYSTEM, USER)
    assert unsure["confidence"] == pytest.approx(direct.confidence, rel=1e-3)
    assert direct.confidence > math.exp(min(direct.token_logprobs))  # the closing bracket is not a value
    assert direct.confidence < 0.85
    kept = notes.interaction(unsure["id"])["interaction"]
    assert kept["flag"] == f"confidence {direct.confidence:.2f} is below 0.85"
    easy = ["a steel beam", "Add a 150 mm brick wall", "a 200 mm concrete slab", "a vinyl window 900 mm wide"]
    known = next(text for text in easy if without_gateway(engine, SYSTEM, {**USER, "content": text}).confidence > 0.86)
    sure = notes.ask(known).json()
    assert notes.interaction(sure["id"])["interaction"]["flag"] is None
    assert notes.metric("finetune_flagged_total") == flagged + 1
    assert notes.http.get("/v1/feedback/stats").json()["flagged"] == stats["flagged"] + 1


def test_the_loops_threshold_decides_what_is_flagged(own_home):
    with serving(make_loop("careless", serving={"review_below": 0.0})) as gateway:
        answer = gateway.ask(PROMPT, model="careless").json()
        assert gateway.interaction(answer["id"])["interaction"]["flag"] is None


def test_history_is_rendered_and_recorded(notes, engine):
    earlier = [{"role": "user", "content": "a brick wall"}, {"role": "assistant", "content": '{"element":"wall"}'}]
    last = {"role": "user", "content": "make it 300 mm thick"}
    answer = notes.ask_all([*earlier, last])
    direct = without_gateway(engine, SYSTEM, *earlier, last)
    assert answer["choices"][0]["message"]["content"] == direct.text
    assert answer["usage"]["prompt_tokens"] == direct.prompt_tokens
    kept = notes.interaction(answer["id"])["interaction"]
    assert (kept["prompt"], kept["history"]) == (last["content"], earlier)


def test_the_loops_system_prompt_is_added_once(notes, engine):
    direct = without_gateway(engine, SYSTEM, USER).prompt_tokens
    sent, unsent = notes.ask_all([SYSTEM, USER]), notes.ask_all([USER])
    assert sent["usage"]["prompt_tokens"] == unsent["usage"]["prompt_tokens"] == direct
    assert notes.interaction(sent["id"])["interaction"]["history"] == []


def test_another_system_prompt_replaces_the_loops(notes, engine):
    other = {"role": "system", "content": "Answer in French."}
    answer = notes.ask_all([{**other, "role": "developer"}, USER])
    assert answer["usage"]["prompt_tokens"] == without_gateway(engine, other, USER).prompt_tokens
    assert notes.interaction(answer["id"])["interaction"]["history"] == [other]


def test_a_message_can_have_parts(notes):
    parts = [{"type": "text", "text": PROMPT[:9]}, {"type": "text", "text": PROMPT[9:]}]
    answer = notes.ask_all([{"role": "user", "content": parts}])
    assert notes.interaction(answer["id"])["interaction"]["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "{}"}], "The last message has the role 'assistant'"),
        ([SYSTEM, {"role": "assistant", "content": "{}"}], "The last message has the role 'assistant'"),
        ([SYSTEM], "The last message has the role 'system'"),
        ([{"role": "user", "content": None}], "content: is missing"),
        ([{"role": "user"}], "content: is missing"),
        ([], "messages: is empty"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
            "messages[0].content",
        ),
    ],
)
def test_the_last_message_must_be_the_users(notes, messages, reason):
    response = notes.http.post("/v1/chat/completions", json={"model": "notes", "messages": messages})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_the_gateways_overhead_is_measured(notes):
    before = notes.metric("finetune_gateway_overhead_seconds_count")
    notes.ask()
    assert notes.metric("finetune_gateway_overhead_seconds_count") == before + 1
    assert notes.metric("finetune_requests_total", route="/v1/chat/completions", status="200") > 0
    assert notes.metric("finetune_tokens_total", loop="notes", kind="completion") > 0


def test_the_clients_answer_object_can_be_sent_back(notes):
    client = notes.openai()
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model="notes", messages=messages).choices[0].message
    more = client.chat.completions.create(
        model="notes", messages=[*messages, answer, {"role": "user", "content": "and 200 mm?"}]
    )
    history = notes.interaction(more.id)["interaction"]["history"]
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    assert history[1]["content"] == answer.content
