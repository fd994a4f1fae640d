"""The request of OpenAI's Responses API, as far as a local model supports it.

Built-in tools, images, files, background responses and conversation objects are refused by name. What a request has in
common with the other APIs that generate is `api.Generation`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finetune_pipeline.records import ShortText, Text
from finetune_pipeline.serving.api import (
    ChatMessage,
    FunctionDefinition,
    Generation,
    Items,
    JsonFormat,
    OpenAIRequest,
    Schema,
    TextFormat,
    TokenLimit,
    TopLogprobs,
    Whole,
    named_function,
    only_function,
    refuse_other_choices,
)
from finetune_pipeline.validation_messages import sentence_error, short_repr

LOGPROBS = "message.output_text.logprobs"
"""The value of `include` with which the answer contains log-probabilities."""

USE_INSTEAD = "response_format (here: text.format)"
"""What a request uses in the place of tools that the model would have to choose."""


def _refuse(sentence: str) -> BeforeValidator:
    """Return a validator that refuses every value but null and false with this sentence."""

    def check(value: Any) -> Any:
        if value is not None and value is not False:
            raise sentence_error(sentence)
        return value

    return BeforeValidator(check)


def _refuse_other_parts(kind: Any) -> Any:
    if kind in ("input_image", "input_file", "input_audio"):
        raise sentence_error(f"{kind}: only text is supported; send its text as input_text")
    return kind


def _refuse_other_items(kind: Any) -> Any:
    if kind in ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"):
        raise sentence_error(f"{kind}: earlier tool calls are not supported yet; send them and their results as text")
    if kind not in ("message", "item_reference", None):
        raise sentence_error(f"found {short_repr(kind)}, but only messages and references to them are supported")
    return kind


class InputPart(OpenAIRequest):
    """A text part of a message; `output_text` is one of an earlier answer."""

    type: Annotated[Literal["input_text", "output_text"], BeforeValidator(_refuse_other_parts)]
    text: Text
    # Clients send earlier answers back with all their fields; these have no effect.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_MESSAGE_OR_REFERENCE: dict[str, Any] = {
    "anyOf": [
        {
            "properties": {
                "type": {"enum": ["message", None]},
                "role": {"type": "string"},
                "content": {"type": ["string", "array"]},
            },
            "required": ["role", "content"],
        },
        {
            "properties": {"type": {"const": "item_reference"}, "id": {"type": "string"}},
            "required": ["type", "id"],
        },
    ]
}
"""Which fields an input item must have, for OpenAPI; `InputItem` enforces them."""


def _missing(field: str, sentence: str) -> ValidationError:
    """Return an error of a field, which a validator of the whole model can raise."""
    return ValidationError.from_exception_data(
        "InputItem", [{"type": sentence_error(sentence), "loc": (field,), "input": None}]
    )


class InputItem(OpenAIRequest):
    """A message, or the reference to the message of an earlier response."""

    model_config = ConfigDict(json_schema_extra=_MESSAGE_OR_REFERENCE)

    type: Annotated[Literal["message", "item_reference"] | None, BeforeValidator(_refuse_other_items)] = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Items[InputPart] | None = None
    id: ShortText | None = Field(default=None, description="Of a reference: the id of an earlier output item.")
    # Of earlier answers.
    status: str | None = None
    phase: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "InputItem":
        if self.reference is not None:
            return self
        if self.type == "item_reference":
            raise _missing("id", "is missing in a reference; send the id of an earlier output item")
        for name in ("role", "content"):
            if getattr(self, name) is None:
                raise _missing(name, "is missing in a message")
        return self

    @property
    def reference(self) -> str | None:
        """The id of the item that this refers to; None for a message."""
        refers = self.type == "item_reference" or (self.type is None and self.role is None)
        return self.id if refers else None

    @property
    def message(self) -> ChatMessage:
        """The message, for an item that is no reference."""
        assert self.role is not None and self.content is not None
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role=self.role, content=text)


class ResponseSchema(OpenAIRequest):
    """text.format for JSON of one schema."""

    type: Literal["json_schema"]
    name: str = "answer"
    schema_: Schema = Field(alias="schema", description="JSON Schema to which the answer is constrained.")
    description: str | None = None
    strict: bool | None = None


class TextSettings(OpenAIRequest):
    """The form of the answer."""

    format: TextFormat | JsonFormat | ResponseSchema | None = Field(default=None, discriminator="type")
    verbosity: str | None = None


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_no_built_in_tool(cls, tool: Any) -> Any:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in ("function", None):
            raise sentence_error(
                f"found the type {short_repr(kind)}, but built-in tools are not supported; leave the tool out"
            )
        return tool


class NamedFunctionTool(OpenAIRequest):
    """tool_choice for one function."""

    type: Literal["function"]
    name: str


class ResponsesRequest(Generation):
    """POST /v1/responses."""

    input: Text | Annotated[Items[InputItem], Field(min_length=1)] = Field(
        description="The prompt, or messages of which the last is the user's."
    )
    instructions: Text | None = Field(
        default=None, description="Replaces the loop's system prompt, for this response only."
    )
    previous_response_id: ShortText | None = Field(
        default=None, description="The response after which the conversation continues."
    )
    max_output_tokens: TokenLimit | None = Field(default=None, description="Most tokens; -1: the loop's default.")
    text: TextSettings | None = None
    tools: Items[FunctionTool] | None = Field(default=None, description="Needs a tool_choice: none, or one function.")
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunctionTool | None, BeforeValidator(refuse_other_choices)
    ] = None
    store: bool | None = Field(default=None, description="False: nothing is recorded. Default true.")
    include: Items[str] | None = Field(default=None, description=f"{LOGPROBS}: log-probabilities; others: no effect.")
    top_logprobs: TopLogprobs | None = None
    background: Annotated[
        Literal[False] | None, _refuse("background responses are not supported; send the request without it")
    ] = None
    conversation: Annotated[
        None, _refuse("conversation objects are not supported; use previous_response_id, or send the messages")
    ] = None
    prompt: Annotated[None, _refuse("stored prompts are not supported; send their text as instructions and input")] = (
        None
    )
    # Of no effect on a local model.
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Whole] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="No effect: a conversation that does not fit is refused."
    )
    prompt_cache_retention: str | None = None

    @property
    def recorded(self) -> bool:
        """Return whether the response is recorded."""
        return self.store is not False

    @property
    def items(self) -> list[InputItem]:
        """The input as items."""
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of the answer."""
        return None if self.max_output_tokens == -1 else self.max_output_tokens

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema to which the answer is constrained."""
        match self.text.format if self.text else None:
            case ResponseSchema(schema_=schema):
                return schema
            case JsonFormat(schema_=schema):
                return schema or {"type": "object"}
            case _:
                return super().output_schema

    @property
    def asks_for_text(self) -> bool:
        """Return whether text.format is text."""
        return self.text is not None and isinstance(self.text.format, TextFormat)

    @property
    def forced_function(self) -> FunctionDefinition | None:
        """The function that `tool_choice` names, or the only one if one is required.

        Raises:
            ValueError: the model would have to choose, or there is no such function.
        """
        choice = self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            return named_function(self.tools or (), choice.name)
        return only_function(self.tools or (), choice, USE_INSTEAD)

    @property
    def logprobs_wanted(self) -> bool:
        """Return whether the answer contains log-probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def top_logprobs_wanted(self) -> int:
        """Number of most probable tokens to return at each position."""
        return (self.top_logprobs or 0) if self.logprobs_wanted else 0
