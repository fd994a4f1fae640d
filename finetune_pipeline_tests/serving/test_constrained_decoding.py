"""`serving.constrain`: gateway, `finetune ask` and evaluation decode alike, and a request's own format is preferred."""

import json

import pytest

from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.ask import generate_answers
from finetune_pipeline.pipeline.evaluate import settings_hash
from finetune_pipeline.schemas import SchemaError, answer_validator
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.settings import UpstreamSettings
from finetune_pipeline_tests.serving.conftest import events, make_loop, serving

SCHEMA = {
    "type": "object",
    "properties": {"part": {"enum": ["wall", "door", "window"]}, "floor": {"type": "integer", "maximum": 99}},
    "required": ["part", "floor"],
    "additionalProperties": False,
}
OTHER = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": OTHER}}
PROMPTS = ["Add a 150 mm brick wall, 3 m high", "a fire door on the 2nd floor", "what is the weather?", "東京 🙂"]
VALID = answer_validator(SCHEMA)


@pytest.fixture(scope="module")
def loops(own_home, tmp_path_factory):
    """Return two loops with an output schema, which the starter model was not trained on: constrained and not."""
    folder = tmp_path_factory.mktemp("loops")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    lines = [
        {"id": f"q{number}", "slice": "all", "prompt": prompt, "expected": {"part": "wall", "floor": number}}
        for number, prompt in enumerate(PROMPTS)
    ]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"benchmark": str(folder / "b.jsonl"), "max_tokens": 64, "context": 512}
    given = {"output_schema": str(folder / "schema.json"), "evaluation": evaluation}
    return {name: make_loop(name, **given, serving={"constrain": name}) for name in ("schema", "none")} | {
        "default": make_loop("default", **given)
    }


@pytest.fixture(scope="module")
def gateway(loops):
    for loop in loops.values():
        base_gguf(loop, print)
    with serving(*loops.values()) as running:
        yield running


def text(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", ["schema", "none", "default"])
def test_gateway_ask_and_evaluation_give_the_same_answers(loops, gateway, name):
    loop = loops[name]
    spec = ModelSpec(gguf=base_gguf(loop, print))
    served = [text(gateway.ask(prompt, model=name)) for prompt in PROMPTS]
    asked = generate_answers(loop, spec, *PROMPTS)
    benchmark = loop_files.benchmark(loop)
    evaluated = answer_benchmark(
        spec, benchmark, loop.evaluation, loop.system_prompt, loop.name, constraint=loop_files.constraint(loop)
    )
    assert served == asked == [answer.text for answer in evaluated.answers]
    problems = [VALID(answer) for answer in served]
    assert problems == [None] * 4 if name != "none" else all(problems)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SCHEMA),
        ({"response_format": None}, SCHEMA),
        ({"temperature": 1.5, "seed": 4}, SCHEMA),
        ({"response_format": {"type": "text"}}, None),
        ({"ignore_eos": True, "max_tokens": 40}, None),
        ({"guided_json": OTHER}, OTHER),
        ({"json_schema": OTHER}, OTHER),
        ({"json_schema": json.dumps(OTHER)}, OTHER),
        ({"tools": [TOOL], "tool_choice": "none"}, SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": OTHER}}}, OTHER),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_requests_own_format_is_preferred(gateway, fields, expected, stream):
    response = gateway.ask(PROMPTS[0], model="schema", stream=stream, **fields)
    if stream:
        parts = [event["choices"][0]["delta"].get("content") for event in events(response)]
        answer = "".join(filter(None, parts))
    else:
        answer = text(response)
    if expected is None:
        assert VALID(answer) and answer == text(gateway.ask(PROMPTS[0], model="none", **fields))
    else:
        assert answer_validator(expected)(answer) is None


def test_a_called_functions_parameters_replace_the_loops_schema(gateway):
    choice = gateway.ask(PROMPTS[0], model="schema", tools=[TOOL], tool_choice="required").json()["choices"][0]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"n":7}']


def test_an_answer_with_a_given_beginning_is_not_constrained(gateway):
    messages = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": '{"element":"'}]
    constrained, free = (gateway.ask_all(messages, model=name) for name in ("schema", "none"))
    assert constrained["choices"][0]["message"] == free["choices"][0]["message"]


def test_a_completion_is_constrained_too(gateway):
    body = {"model": "schema", "prompt": PROMPTS[2]}
    answer = gateway.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer == text(gateway.ask(PROMPTS[2], model="schema"))


@pytest.mark.parametrize(("form", "same_as"), [(None, "schema"), ({"type": "text"}, "none")])
def test_a_response_is_constrained_too(gateway, form, same_as):
    body = {"model": "schema", "input": PROMPTS[2], **({"text": {"format": form}} if form else {})}
    [item] = gateway.http.post("/v1/responses", json=body).json()["output"]
    assert item["content"][0]["text"] == text(gateway.ask(PROMPTS[2], model=same_as))


def test_an_answer_that_max_tokens_cuts_off_says_so(gateway):
    choice = gateway.ask(PROMPTS[0], model="schema", max_tokens=3).json()["choices"][0]
    assert choice["finish_reason"] == "length" and VALID(choice["message"]["content"])


def test_another_server_gets_the_schema_as_response_format(loops, gateway):
    given = {"upstream": UpstreamSettings(url=f"{gateway.url}/v1", model="none"), "fallback": None}
    far = loops["schema"].model_copy(
        update={"name": "far", "serving": loops["schema"].serving.model_copy(update=given)}
    )
    with serving(far) as running:  # the other server does not constrain this model by itself
        assert text(running.ask(PROMPTS[2], model="far")) == text(gateway.ask(PROMPTS[2], model="schema"))


def test_a_comparison_is_valid_for_one_setting(loops):
    constrained, free, default = (settings_hash(loops[name]) for name in ("schema", "none", "default"))
    assert constrained == default != free


def test_a_gateway_does_not_start_with_a_schema_that_it_cannot_enforce(loops, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**SCHEMA, "not": {"required": ["x"]}}))
    odd = loops["default"].model_copy(update={"output_schema": str(path)})
    with pytest.raises(SchemaError, match=r"odd\.json cannot be enforced while decoding: .* serving\.constrain: none"):
        Gateway([odd], None)
