"""Tools that the request forces: the answer is a call, and its arguments are what is recorded."""

import json

import openai
import pytest

from finetune_pipeline_tests.serving.conftest import PROMPT

USER = {"role": "user", "content": PROMPT}
PARAMETERS = {
    "type": "object",
    "properties": {"element": {"enum": ["wall"]}, "thickness_mm": {"type": "integer", "minimum": 1, "maximum": 999}},
    "required": ["element", "thickness_mm"],
    "additionalProperties": False,
}
WALL = {"type": "function", "function": {"name": "add_wall", "description": "Add.", "parameters": PARAMETERS}}
DOOR = {"type": "function", "function": {"name": "add_door"}}
NAMED = {"type": "function", "function": {"name": "add_wall"}}


def ask(notes, **fields):
    return notes.openai().chat.completions.create(model="notes", messages=[USER], **fields)


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
    answer = ask(notes, stream=stream, **fields)
    if stream:
        chunks = list(answer)
        id = chunks[0].id
        pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        call_id, name, kind = pieces[0].id, pieces[0].function.name, pieces[0].type
        arguments = "".join(piece.function.arguments for piece in pieces)
        assert {piece.index for piece in pieces} == {0}
        assert len(pieces) > 5
        assert [chunk.choices[0].delta.content for chunk in chunks] == [None] * len(chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        id, [choice] = answer.id, answer.choices
        [call] = choice.message.tool_calls
        call_id, name, kind, arguments = call.id, call.function.name, call.type, call.function.arguments
        assert choice.message.content is None
        reason = choice.finish_reason
    assert (name, kind, reason) == ("add_wall", "function", "tool_calls")
    assert call_id.startswith("call_")
    assert json.loads(arguments)["element"] == "wall"
    assert notes.interaction(id)["interaction"]["output"] == arguments


def test_a_function_without_parameters_has_no_arguments(notes):
    answer = ask(notes, tools=[DOOR], tool_choice="required")
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {}


@pytest.mark.parametrize("parameters", [{"enum": [1, {"n": 7}]}, {"anyOf": [{"const": 1}, {"const": {"n": 7}}]}])
def test_arguments_are_an_object_also_if_their_schema_does_not_say_so(notes, parameters):
    [number] = notes.gateway.servers["notes"].current.runner.tokenize("1")
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = ask(notes, tools=[tool], tool_choice="required", logit_bias={str(number): 100})
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"n": 7}


def test_several_calls_have_ids_of_their_own(notes):
    answer = ask(notes, tools=[WALL], tool_choice="required", n=2)
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 2


def test_a_call_that_is_cut_off_says_so(notes):
    answer = ask(notes, tools=[WALL], tool_choice="required", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"


def test_the_official_clients_stream_assembles_the_call(notes):
    with notes.openai().chat.completions.stream(
        model="notes", messages=[USER], tools=[WALL], tool_choice=NAMED
    ) as stream:
        [call] = stream.until_done().get_final_completion().choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)["element"]) == ("add_wall", "wall")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WALL, DOOR], "tool_choice": "none"},
        {"tools": [{**WALL, "function": {"name": "f", "parameters": {"type": "string"}}}], "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "auto"},
        {"parallel_tool_calls": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_tool_to_choose_the_answer_is_text(notes, fields, stream):
    plain = ask(notes).choices[0].message.content
    answer = ask(notes, stream=stream, **fields)
    parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    assert "".join(part.content or "" for part in parts) == plain
    assert not any(part.tool_calls for part in parts)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tools": [WALL]}, "tool_choice", "'auto' .* is not supported yet, use response_format"),
        ({"tools": [WALL, DOOR]}, "tool_choice", "'auto' .* is not supported yet, use response_format"),
        ({"tools": [WALL], "tool_choice": "auto"}, "tool_choice", "is not supported yet, use response_format"),
        ({"tools": [WALL, DOOR], "tool_choice": "required"}, "tool_choice", "is not supported yet"),
        ({"tools": [DOOR], "tool_choice": NAMED}, "tool_choice", "names the function 'add_wall', but .* add_door"),
        ({"tool_choice": NAMED}, "tool_choice", "but the functions in tools are: none"),
        ({"tool_choice": "required"}, "tool_choice", "needs a function in tools"),
        ({"tool_choice": "maybe"}, "tool_choice", "maybe"),
        ({"functions": [{"name": "f"}]}, "functions", "deprecated form of tools"),
        ({"function_call": {"name": "f"}}, "function_call", "deprecated form of tools"),
        ({"tools": [{**WALL, "function": {"name": "no spaces"}}]}, "tools[0].function.name", "no spaces"),
        (
            {"tools": [{**WALL, "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "required"},
            None,
            "not",
        ),
        *(
            (
                {"tools": [{**WALL, "function": {"name": "f", "parameters": {"type": kind}}}], "tool_choice": choice},
                "tool_choice",
                "parameters of the function 'f' have the type .*, expected 'object'",
            )
            for kind in ("string", ["object", "null"])
            for choice in ("required", {"type": "function", "function": {"name": "f"}})
        ),
    ],
)
def test_what_is_not_supported_yet_is_refused(notes, fields, param, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        ask(notes, **fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "tool_call_id": "call_1", "content": "7"}, "messages[1].role"),
        ({"role": "function", "name": "f", "content": "7"}, "messages[1].role"),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            "messages[1].tool_calls",
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "messages[1].function_call",
        ),
    ],
    ids=["tool", "function", "tool_calls", "function_call"],
)
def test_earlier_tool_calls_are_refused(notes, message, param):
    with pytest.raises(openai.BadRequestError, match="not supported yet; send") as refused:
        notes.openai().chat.completions.create(model="notes", messages=[USER, message, USER])
    assert refused.value.param == param
