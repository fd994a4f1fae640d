"""What people read about an invalid value: our words, not pydantic's."""

import json
import re

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core._pydantic_core import list_all_errors

from finetune_pipeline.records import Event, Feedback, Interaction
from finetune_pipeline.serving.api import ChatRequest, FeedbackIn, InteractionIn
from finetune_pipeline.settings import COMPONENT_TYPE, SettingsError, read_loop
from finetune_pipeline.validation_messages import PATTERNS, error_message, messages_of, short_message, without_values
from finetune_pipeline.wording import sentence

PYDANTIC = re.compile(
    r"should|Input|valid |unable to|instance of|dictionary|Unable|\bstring\b|after validation|\bNone\b"
)
ID = "0190b6f0-0000-7000-8000-000000000001"

SETTINGS = """
name: notes
base_model: some/model
evaluation: {benchmark: notes.jsonl, metric: rouge1}
"""


# Types of errors that no field of the package can have.
UNUSED = {
    "arguments_type", "callable_type", "default_factory_not_called", "ellipsis_error", "frozen_field",
    "frozen_instance", "get_attribute_error", "is_instance_of", "is_subclass_of", "iterable_type", "iteration_error",
    "json_type", "missing_sentinel_error", "multiple_argument_values", "needs_python_object", "no_such_attribute",
    "recursion_depth_exceeded", "recursion_loop", "set_item_not_hashable", "unexpected_positional_argument",
    "assertion_error", "value_error",
}  # fmt: skip
OTHER = ("complex", "counter", "date_past", "date_future", "datetime_past", "datetime_future", "decimal_", "deque")
OTHER += ("fraction", "frozen_dict", "named_tuple", "ordered_dict", "url_scheme", "string_not_ascii", "bytes_invalid")
OTHER += ("dataclass_exact", "url_too_long")


@pytest.mark.parametrize(
    "error",
    [one for one in list_all_errors() if one["type"] not in UNUSED and not one["type"].startswith(OTHER)],
    ids=lambda one: one["type"],
)
@pytest.mark.parametrize("names", [None, {"": ["name"]}], ids=["record", "settings"])
def test_no_type_of_error_is_in_pydantics_words(error, names):
    context = {name: given or "7" for name, given in (error.get("example_context") or {}).items()}
    message = error["message_template_python"].format(**context | {"expected_plural": "s"})
    for value in ("x", "", None, 7, [1], {"a": 1}):
        given = {"type": error["type"], "loc": ("field",), "msg": message, "input": value, "ctx": context}
        (line,) = messages_of([given], names)
        line = line.replace("'field'", "field")  # the name of an unknown field is quoted
        assert line.startswith("field: ")
        assert not PYDANTIC.search(line.removeprefix("field: "))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("training: {lr: 0.1}", "training.lr: unknown setting; did you mean learning_rate?"),
        ("training: {r: 8}", "training.r: unknown setting; did you mean lora_r?"),
        ("training:", "training: is empty; remove the key, or put settings under it"),
        ("training: {seed: }", "training.seed: is empty; remove the key, or give it a value"),
        ("training: 5", "training: found 5, expected a mapping"),
        ("sources:", "sources: is empty; remove the key, or put settings under it"),
        ("training: {num_train_epochs: three}", "training.num_train_epochs: found 'three', expected a number"),
        ("training: {lora_r: 1.5}", "training.lora_r: found 1.5, expected a whole number"),
        ("training: {gradient_checkpointing: maybe}", "training.gradient_checkpointing: found 'maybe', expected true"),
        (
            "training: {lora_target_modules: q_proj}",
            "training.lora_target_modules: found 'q_proj', expected all-linear, or a list: [q_proj]",
        ),
        ("name: My Loop", "name: found 'My Loop', expected lower-case letters, digits and _, starting with a letter"),
        ("base_model: [a]", "base_model: found ['a'], expected a text"),
        ("training: {method: ppo}", "training.method: found 'ppo', expected auto, sft, dpo or kto"),
    ],
)
def test_settings(tmp_path, given, message):
    text = "".join(f"  {line}\n" for line in SETTINGS.strip().splitlines() if line.split(":")[0] != given.split(":")[0])
    path = tmp_path / "notes" / "defs.yaml"
    path.parent.mkdir()
    path.write_text(f"type: {COMPONENT_TYPE}\nattributes:\n{text}  {given}\n")
    with pytest.raises(SettingsError) as caught:
        read_loop(path)
    assert str(caught.value).startswith(f"{path}: invalid settings:\n  {message}")
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Event, [1, 2], "found a list, expected a JSON object"),
        (Event, {}, "event is missing"),
        (Event, {"event": "x"}, "unknown event 'x'; expected one of interaction, feedback"),
        (Feedback, {"id": "abc"}, "id: found 'abc', expected a UUID"),
        (Feedback, {"id": "z" * 36}, f"id: found '{'z' * 36}', expected a UUID"),
        (Feedback, {"created_at": "yesterday"}, "expected a time such as 2026-03-02T09:14:00Z"),
        (Feedback, {"output_hash": "x"}, "output_hash: found 'x', expected a SHA-256 of 64 hexadecimal digits"),
        (Interaction, {"prompt": ""}, "prompt: is empty"),
        (Interaction, {"confidence": "high"}, "confidence: found 'high', expected a number"),
        (Interaction, {"history": "hello"}, "history: found 'hello', expected a list"),
        (Interaction, {"history": ["x"]}, "history[0]: found a text, expected a JSON object"),
        (InteractionIn, {"source": "vault"}, "source: is not supported; leave it out"),
        (FeedbackIn, {"kind": "applause"}, "kind: found 'applause', expected 'success', 'correction',"),
        (ChatRequest, {"tools": [{"type": "function"}]}, "tools[0].function: is missing"),
        (
            ChatRequest,
            {"tools": [{"type": "function", "function": {"name": "two words"}}]},
            "tools[0].function.name: found 'two words', expected up to 128 letters, digits and _ . : -",
        ),
        (ChatRequest, {"functions": [{"name": "f"}]}, "functions: OpenAI's deprecated form of tools is not supported"),
        (ChatRequest, {"n": 65}, "n: a value above 64 is not supported; send a smaller one"),
        (ChatRequest, {"presence_penalty": 3}, "presence_penalty: found 3, expected less than or equal to 2"),
        (ChatRequest, {"logit_bias": {"wall": 5}}, "logit_bias: expected ids of tokens, not 'wall'"),
        (ChatRequest, {"max_tokens": 0}, "max_tokens: found 0, expected at least 1 (or -1 for the default)"),
        (ChatRequest, {"guided_choice": ["a"]}, "guided_choice: only JSON Schemas are supported"),
        (
            ChatRequest,
            {"tool_choice": "maybe"},
            "tool_choice: found 'maybe', expected 'none', 'auto', 'required', or one function",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "tool", "content": "7"}]},
            "messages with the role 'tool' are not supported",
        ),
        (
            ChatRequest,
            {"metadata": {"gateway": {}}},
            "metadata: the key 'gateway' is reserved for the gateway; use another one",
        ),
        (ChatRequest, {"messages": []}, "messages: is empty"),
        (ChatRequest, {"stream": "yes"}, "stream: found 'yes', expected true or false"),
        (ChatRequest, {"max_tokens": 5.5}, "max_tokens: found 5.5, expected a whole number"),
        (ChatRequest, {"stop": ["x"] * 17}, "stop: found 17 items, expected at most 16"),
        (ChatRequest, {"messages": [{"role": "user", "content": 7}]}, "content: found 7, expected a text, or a list"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]},
            "messages[0].content[0]: found the type 'image', but only 'text' is supported; send it as text",
        ),
        (ChatRequest, {"response_format": {"type": "xml"}}, "response_format: unknown type 'xml'; expected one of"),
    ],
)
def test_records_and_bodies(model, given, message):
    valid = {
        Feedback: {"id": ID, "loop": "notes", "interaction_id": ID, "kind": "thumbs_up", "created_at": "2026-01-01"},
        Interaction: {"id": ID, "loop": "notes", "prompt": "p", "output": "o", "created_at": "2026-01-01"},
        InteractionIn: {"loop": "notes", "prompt": "p", "output": "o"},
        FeedbackIn: {"interaction_id": ID, "kind": "thumbs_up"},
        ChatRequest: {"model": "notes", "messages": [{"role": "user", "content": "hi"}]},
    }.get(model)
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_json(json.dumps(given if valid is None else valid | given))
    assert message in error_message(caught.value)
    assert error_message(caught.value).count(" expected ") <= 1


LONG = "Ann Canary " * 20


@pytest.mark.parametrize(
    "given",
    [
        {"Ann Canary has cancer": 1},
        {"history": [{"role": "user", "content": "x", "AnnCanary": 1}]},
        {"confidence": LONG, "validation_score": "Bob Canary"},
        {"confidence": [LONG, "it's"], "validation_score": "Bob Canary"},
        {"history": {"a": LONG}, "validation_score": "Bob Canary"},
        {"user": b"Ann Canary \xff", "validation_score": "Bob Canary"},
        {"metadata": {"AnnCanary": {1}}},
        {"created_at": f"{LONG} it's", "loop": "Bob Canary's"},
    ],
)  # fmt: skip
def test_a_message_without_values_has_nothing_of_the_record(given):
    valid = {"id": ID, "loop": "notes", "prompt": "p", "output": "o", "created_at": "2026-01-01"}
    with pytest.raises(ValidationError) as caught:
        Interaction.model_validate(valid | given)
    message = error_message(caught.value)
    assert "Canary" not in without_values(message)
    for limit in range(8, len(message), 7):
        assert "Canary" not in without_values(f"{short_message(message, limit)}; 1: found 'Bob Canary'")


def test_the_first_problems_are_named_and_the_others_counted():
    with pytest.raises(ValidationError) as caught:
        Interaction.model_validate({})
    assert error_message(caught.value) == "id: is missing; loop: is missing; created_at: is missing (and 2 more)"


def test_every_pattern_is_in_words():
    def patterns(schema):
        if isinstance(schema, dict):
            yield from [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
            yield from (one for value in schema.values() for one in patterns(value))
        elif isinstance(schema, list):
            yield from (one for value in schema for one in patterns(value))

    from finetune_pipeline.settings import LoopSettings

    models: list[type[BaseModel]] = [LoopSettings, Feedback, Interaction, FeedbackIn, InteractionIn, ChatRequest]
    found = {one for model in models for one in patterns(model.model_json_schema())}
    assert found - PATTERNS.keys() == {r"^[^\u0000]*$", r"\S", r"^[0-9]{1,9}$"}  # for OpenAPI; validated by functions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no loop is named 'x'; create it", "No loop is named 'x'; create it."),
        ("base_model: the folder /x does not exist", "base_model: the folder /x does not exist."),
        ("/x/defs.yaml is not UTF-8 (at byte 0)", "/x/defs.yaml is not UTF-8 (at byte 0)."),
        ("The server is down.", "The server is down."),
        ("the file exists; overwrite it with --force", "The file exists; overwrite it with --force"),
        ("", ""),
    ],
)
def test_an_error_of_a_command_is_a_sentence(text, expected):
    assert sentence(text) == expected
