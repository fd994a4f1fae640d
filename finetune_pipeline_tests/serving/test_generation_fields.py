"""Fields that OpenAI-compatible servers accept: honored where llama.cpp can, accepted where they change nothing."""

import json
import logging

import openai
import pytest

from finetune_pipeline.serving.api import ChatRequest
from finetune_pipeline_tests.serving.conftest import PROMPT, events, make_loop, serving

USER = {"role": "user", "content": PROMPT}
SEVEN = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}


def text(response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def greedy(notes):
    return text(notes.ask())


@pytest.mark.parametrize(
    "fields",
    [
        # sentinels
        {"max_tokens": -1},
        {"max_completion_tokens": -1},
        {"n_predict": -1},
        {"top_k": -1},
        {"seed": -1},
        {"repeat_last_n": -1},
        # nulls
        dict.fromkeys(
            (
                "max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop", "n", "logprobs",
                "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "repeat_penalty", "tools",
                "repetition_penalty", "response_format", "tool_choice", "functions", "function_call", "user", "store",
                "metadata", "guided_json", "guided_regex", "guided_choice", "grammar", "structured_outputs",
                "chat_template_kwargs", "ignore_eos", "cache_prompt", "stream_options", "parallel_tool_calls",
                "service_tier", "reasoning_effort", "verbosity", "prompt_cache_key", "safety_identifier",
            )
        ),
        # values without effect
        {"n": 1, "tools": [], "functions": [], "logit_bias": {}, "stop": [], "top_logprobs": 0},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repeat_penalty": 1, "repetition_penalty": 1.0},
        {"grammar": "", "guided_regex": "", "guided_choice": [], "structured_outputs": {"regex": "", "choice": []}},
        {"top_p": 1, "top_k": 0, "min_p": 0, "typical_p": 1, "stop": ["", "never"], "chat_template_kwargs": {}},
        {"store": True, "service_tier": "auto", "reasoning_effort": "low", "verbosity": "low", "cache_prompt": True},
        {"structured_outputs": {}, "response_format": {"type": "text"}, "parallel_tool_calls": False},
        # at temperature 0, nothing is sampled
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "seed": 5},
        # variables that the template does not use
        {"chat_template_kwargs": {"enable_thinking": True, "note": "<|im_end|>"}},
    ],
    ids=lambda fields: "null" if None in fields.values() else ",".join(fields),
)  # fmt: skip
def test_values_without_effect_are_accepted(notes, greedy, fields):
    response = notes.ask(**fields)
    assert text(response) == greedy
    assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"top_p": 0}, {"logit_bias": {}, "top_k": 1.0}], ids=str
)
def test_samplers_that_leave_one_token_are_greedy(notes, greedy, fields):
    assert text(notes.ask(temperature=1.5, seed=3, **fields)) == greedy


@pytest.mark.parametrize(
    "fields", [{"top_k": 2}, {"min_p": 0.3}, {"typical_p": 0.3}, {"repeat_penalty": 1.9}, {"presence_penalty": 2}]
)
def test_a_sampler_changes_what_a_seed_gives_and_the_seed_reproduces_it(notes, fields):
    sampled = {"temperature": 2, "seed": 11, "max_tokens": 40}
    plain = text(notes.ask(**sampled))
    first, again = (text(notes.ask(**sampled, **fields)) for _ in range(2))
    assert first == again != plain


@pytest.mark.parametrize(
    "fields",
    [
        {"repeat_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"repeat_penalty": 2.0, "repetition_penalty": 2.0, "repeat_last_n": -1},
        {"frequency_penalty": 2},
        {"presence_penalty": 2.0},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_a_penalty_changes_the_most_probable_answer(notes, greedy, fields):
    assert text(notes.ask(max_tokens=60, **fields)) != greedy[:200]


def test_without_tokens_to_look_back_at_there_is_no_repeat_penalty(notes, greedy):
    assert text(notes.ask(repeat_penalty=2.0, repeat_last_n=0)) == greedy


def first_token_id(notes) -> int:
    """Return the id of the token that the answer starts with, by excluding candidates."""
    answer = notes.ask(max_tokens=1, logprobs=True, top_logprobs=2).json()
    best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["token"]
    [found] = notes.gateway.servers["notes"].current.runner.tokenize(best)
    return int(found)


@pytest.mark.parametrize("form", ["object", "pairs", "false", "null"])
def test_logit_bias_excludes_a_token(notes, greedy, form):
    id = first_token_id(notes)
    bias = {
        "object": {str(id): -100},
        "pairs": [[id, -100]],
        "false": [[id, False]],
        "null": {str(id): None},
    }[form]
    assert text(notes.ask(max_tokens=1, logit_bias=bias)) != text(notes.ask(max_tokens=1))


@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}, {"logit_bias": {"5": None}}])
def test_logit_bias_chooses_a_token_whatever_else_is_excluded(notes, more):
    bias = {"300": 100, **more.get("logit_bias", {})}
    answer = text(notes.ask(max_tokens=8, **{**more, "logit_bias": bias}))
    assert answer == 8 * answer[: len(answer) // 8] != text(notes.ask(max_tokens=8, **more))


def test_ignore_eos_continues_to_max_tokens(notes, greedy):
    answer = notes.ask(max_tokens=200, ignore_eos=True).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 200)
    assert answer["choices"][0]["message"]["content"].startswith(greedy)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER], "guided_json": SEVEN},
        {"messages": [USER], "guided_json": json.dumps(SEVEN)},
        {"messages": [USER], "structured_outputs": {"json": SEVEN}},
        {"messages": [USER], "structured_outputs": {"json": json.dumps(SEVEN), "regex": None}},
        {"messages": [USER], "response_format": {"type": "json_object", "schema": SEVEN}},
        {"prompt": PROMPT, "guided_json": SEVEN},
        {"prompt": PROMPT, "structured_outputs": {"json": SEVEN}},
    ],
    ids=["object", "text", "structured", "structured text", "json_object", "completions", "completions structured"],
)
def test_a_schema_constrains_the_answer_in_every_form(notes, fields):
    path = "completions" if "prompt" in fields else "chat/completions"
    answer = notes.http.post(f"/v1/{path}", json={"model": "notes", **fields}).json()["choices"][0]
    assert json.loads(answer["text"] if "prompt" in fields else answer["message"]["content"]) == {"n": 7}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": SEVEN, "ignore_eos": True}, "ignore_eos"),
        ({"repeat_penalty": 1.5, "repetition_penalty": 1.2}, "repeat_penalty"),
    ],
)
def test_contradicting_fields_are_refused(notes, fields, param):
    response = notes.ask(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# ---- unknown fields


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_named_in_a_header_and_logged_once(notes, caplog, greedy, stream):
    name = f"mirostat_{stream}"
    with caplog.at_level(logging.WARNING, "finetune_pipeline.serving.gateway"):
        for _ in range(2):
            body = {name: 2, "größe": 1, "unset": None, "messages": [{**USER, "cache_control": {"type": "x"}}]}
            response = notes.http.post("/v1/chat/completions", json={"model": "notes", "stream": stream, **body})
            assert response.status_code == 200
            named = {name, "gr%C3%B6%C3%9Fe", "messages.cache_control"}
            assert set(response.headers["x-ignored-fields"].split(", ")) == named
    assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_the_official_client_sends_extra_fields(notes):
    raw = notes.openai().chat.completions.with_raw_response.create(
        model="notes", messages=[USER], extra_body={"top_k": 5, "dry_multiplier": 0.5}
    )
    assert raw.headers["x-ignored-fields"] == "dry_multiplier"


@pytest.mark.parametrize(("letter", "named"), [("x", 20), ("ü", 6), ("🧱", 3)])
def test_many_unknown_fields_fit_into_the_header(notes, letter, named):
    response = notes.ask(max_tokens=1, **{f"f{n}" + letter * 500: 1 for n in range(300)})
    assert response.status_code == 200
    assert len(response.headers["x-ignored-fields"]) <= 4096
    assert response.headers["x-ignored-fields"].count(", ") == named
    assert response.headers["x-ignored-fields"].endswith(", ...")


def test_unknown_fields_have_the_same_order_in_every_process():
    parts = ("response_format", "stream_options", "tool_choice")
    body = {"model": "notes", "messages": [USER | {"x": 1}], "stream_options": {"x": 1}, "x": 1}
    body |= {
        "response_format": {"type": "text", "x": 1},
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    body["tool_choice"]["x"] = 1
    assert ChatRequest.model_validate(body).ignored_fields == ["x", "messages.x", *(f"{part}.x" for part in parts)]


def test_a_loop_can_reject_unknown_fields(own_home):
    with serving(make_loop("strict", serving={"unknown_fields": "reject"})) as gateway:
        assert gateway.ask(model="strict", max_tokens=2, top_k=5).status_code == 200
        response = gateway.ask(model="strict", temprature=0.5)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "temprature")
        assert "Unknown fields: 'temprature'" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/feedback", {"interaction_id": "0198f2b2-0000-7000-8000-000000000000", "kind": "thumbs_up"}),
        ("/v1/interactions", {"loop": "notes", "prompt": "p", "output": "o"}),
        ("/admin/reload-model", {}),
        ("/admin/rollback", {}),
    ],
)
def test_other_routes_reject_unknown_fields(notes, path, body):
    response = notes.http.post(path, json={**body, "temprature": 0.5})
    assert response.status_code == 400
    assert "'temprature': unknown field" in response.json()["error"]["message"]


# ---- several answers


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_answers_is_an_interaction(notes, path, stream):
    what = {"messages": [USER]} if path == "chat/completions" else {"prompt": PROMPT, "best_of": 3}
    body = {"model": "notes", "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 20, "stream": stream, **what}
    response = notes.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    texts, ids, seeds, ends = [""] * 3, [""] * 3, [0] * 3, [""] * 3
    chunks = events(response) if stream else [response.json()]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        at = choice["index"]
        part = choice.get("delta") or choice.get("message") or choice
        texts[at] += part.get("content") or part.get("text") or ""
        ids[at] = choice.get("interaction_id") or ids[at]
        seeds[at] = part.get("seed") or choice.get("seed") or seeds[at]
        ends[at] = choice["finish_reason"] or ends[at]
    assert ids[0] == chunks[0]["id"] == response.headers["x-interaction-id"]
    assert len({*ids}) == len({*texts}) == 3
    assert (seeds, {*ends} <= {"stop", "length"}) == ([5, 6, 7], True)
    kept = [notes.interaction(id)["interaction"] for id in ids]
    assert [one["output"] for one in kept] == texts
    assert [one["seed"] for one in kept] == seeds
    assert {one["prompt"] for one in kept} == {PROMPT}


def test_a_prompt_with_several_answers_counts_once_in_the_usage(notes):
    client = notes.openai()
    one = client.chat.completions.create(model="notes", messages=[USER], max_tokens=5)
    three = client.chat.completions.create(model="notes", messages=[USER], max_tokens=5, n=3)
    assert (three.usage.prompt_tokens, three.usage.completion_tokens) == (one.usage.prompt_tokens, 15)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_answered_in_order(notes, stream):
    client, prompts = notes.openai(), ["a steel beam", "a vinyl window 900 mm wide", PROMPT]
    alone = [client.completions.create(model="notes", prompt=prompt).choices[0].text for prompt in prompts]
    answer = client.completions.create(model="notes", prompt=prompts, stream=stream)
    texts = [""] * 3
    for choice in (choice for chunk in (answer if stream else [answer]) for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert texts == alone


@pytest.mark.parametrize("stream", [False, True])
def test_echo_returns_the_prompt_before_the_answer(notes, stream):
    client = notes.openai()
    plain = client.completions.create(model="notes", prompt=PROMPT).choices[0].text
    answer = client.completions.create(model="notes", prompt=[PROMPT, PROMPT], echo=True, stream=stream)
    texts = ["", ""]
    for choice in (choice for chunk in (answer if stream else [answer]) for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert texts == [PROMPT + plain] * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"best_of": 2}, "best_of: only the value of n"),
        ({"echo": True, "logprobs": 1}, "max_tokens: with echo and logprobs"),
        ({"echo": True, "logprobs": 1, "max_tokens": 9}, "it must be 0 or 1"),
        ({"echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}, "stream: is not supported"),
        ({"echo": True, "max_tokens": 0}, "max_tokens: found 0, expected at least 1"),
        ({"logprobs": 1, "max_tokens": 0}, "max_tokens: found 0, expected at least 1"),
        ({"max_tokens": -2}, "max_tokens: found -2"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a"] * 33, "n": 2}, "66 answers, at most 64"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_what_completions_do_not_support_is_refused(notes, fields, reason):
    response = notes.http.post("/v1/completions", json={"model": "notes", "prompt": PROMPT, **fields})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_more_answers_than_places_wait_for_each_other(own_home):
    with serving(make_loop("narrow", serving={"parallel": 1, "queue": 0})) as gateway:
        answer = gateway.ask(model="narrow", n=4, max_tokens=4)
        assert len(answer.json()["choices"]) == 4


# ---- log-probabilities


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("logprobs", [0, 2])
def test_echo_with_logprobs_scores_the_prompt_and_records_nothing(notes, max_tokens, logprobs):
    """Evaluation harnesses, such as lm-eval, compare continuations by these numbers."""
    client, prompts = notes.openai(), ["A brick wall, 3 m high", "A brick wall, 3 m cat"]
    fields = {"model": "notes", "temperature": 0, "max_tokens": max_tokens, "logprobs": logprobs, "echo": True}
    raw = client.completions.with_raw_response.create(prompt=prompts, **fields)
    answer = raw.parse()
    sums = []
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert choice.text.startswith(prompt) and "".join(scores.tokens) == choice.text
        assert len(scores.token_logprobs) == len(scores.tokens) == len(scores.text_offset)
        assert scores.text_offset == [sum(map(len, scores.tokens[:at])) for at in range(len(scores.tokens))]
        prompt_scores = scores.token_logprobs[: len(scores.tokens) - max_tokens]
        assert prompt_scores[0] is None and all(one < 0 for one in prompt_scores[1:])
        if logprobs:
            assert scores.top_logprobs[0] is None and all(len(top) in (1, 2) for top in scores.top_logprobs[1:])
        else:
            assert scores.top_logprobs is None
        sums.append(sum(prompt_scores[1:]))
        assert notes.http.get(f"/v1/interactions/{choice.interaction_id}").status_code == 404
    assert sums[0] > sums[1]  # "high" is more probable than "cat"
    assert "x-interaction-id" not in raw.headers
    assert answer.usage.completion_tokens == 2 * max_tokens
    assert notes.health()["status"] == "ok"


def test_many_scores_are_no_empty_answers(own_home):
    with serving(make_loop("scored")) as gateway:
        body = {"model": "scored", "prompt": ["wall"] * 30, "max_tokens": 0, "logprobs": 1, "echo": True}
        assert gateway.http.post("/v1/completions", json=body).status_code == 200
        assert gateway.health()["loops"]["scored"]["last_error"] is None


def test_a_scored_prompt_has_no_chat_template_and_no_schema(own_home, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    loop = make_loop("scored", system_prompt="Something else.", output_schema=str(tmp_path / "schema.json"))
    with serving(loop, make_loop()) as gateway:
        body = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "echo": True}
        scored, plain = (
            gateway.http.post("/v1/completions", json={"model": model, **body}).json()["choices"][0]["logprobs"]
            for model in ("scored", "notes")
        )
        assert scored == plain


def test_top_logprobs_contain_the_greedy_token_first(notes):
    answer = notes.openai().chat.completions.create(model="notes", messages=[USER], logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in tokens] == [3] * len(tokens)
    for token in tokens:
        best = [one.logprob for one in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob == pytest.approx(best[0])


@pytest.mark.parametrize("stop", [None, ["brick"]])
def test_log_probabilities_stream_with_their_tokens(notes, stop):
    client = notes.openai()
    fields = {"model": "notes", "messages": [USER], "logprobs": True, "top_logprobs": 2, "stop": stop}
    complete = client.chat.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    with_text = [chunk for chunk in chunks if chunk.delta.content]
    assert len(with_text) > 5
    assert all(chunk.logprobs and chunk.logprobs.content for chunk in with_text)
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in complete.logprobs.content]
    assert [len(token.top_logprobs) for token in streamed] == [2] * len(streamed)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_have_log_probabilities_in_their_own_format(notes, stream):
    client = notes.openai()
    answer = client.completions.create(model="notes", prompt=PROMPT, logprobs=2, stream=stream)
    parts = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    full = "".join(part.text for part in parts)
    found = [part.logprobs for part in parts if part.logprobs]
    tokens = [token for part in found for token in part.tokens]
    offsets = [offset for part in found for offset in part.text_offset]
    assert "".join(tokens) == full
    assert offsets == [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    assert all(len(top) in (1, 2) for part in found for top in part.top_logprobs)
    assert sum(len(part.token_logprobs) for part in found) == len(tokens)


def test_the_official_clients_stream_keeps_confidence_seed_and_id(notes):
    complete = notes.openai().chat.completions.create(model="notes", messages=[USER], temperature=1, seed=4)
    with notes.openai().chat.completions.stream(
        model="notes", messages=[USER], temperature=1, seed=4, logprobs=True
    ) as stream:
        final = stream.until_done().get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == (complete.choices[0].message.content, "stop")
    assert (final.message.confidence, final.message.seed) == (complete.confidence, 4)
    assert notes.interaction(final.interaction_id)["interaction"]["output"] == final.message.content
    assert "".join(token.token for token in final.logprobs.content) == final.message.content


def test_a_bias_for_a_token_that_does_not_exist_is_refused(notes):
    with pytest.raises(openai.BadRequestError, match="logit_bias: the model has no token 99999"):
        notes.openai().chat.completions.create(model="notes", messages=[USER], logit_bias={"99999": 1})
