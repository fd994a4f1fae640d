"""The schemas of requests and responses: OpenAI's, as far as a local model supports them, and the feedback API's.

Fields of OpenAI's requests that a local model can honor are honored, and values that change nothing (null, `-1`, an
empty list) are accepted. Unknown fields are accepted there and reported to the client (`Generation.ignored_fields`),
because every client and server has some of its own. The requests of the feedback API are strict.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.json_schema import check_depth
from finetune_pipeline.inference.protocol import SEEDS
from finetune_pipeline.records import (
    Count,
    EventMetadata,
    Feedback,
    FeedbackKind,
    GivenRating,
    Interaction,
    ShortText,
    Text,
    Turn,
    UtcDatetime,
)
from finetune_pipeline.validation_messages import sentence_error, short_repr
from finetune_pipeline.wording import counted


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = BeforeValidator(_whole)
"""Accepts 5.0 as 5, because JSON has only one type of number."""


def _at_most(limit: int) -> BeforeValidator:
    """Return a validator that refuses larger numbers by name."""

    def check(number: Any) -> Any:
        if isinstance(number, int | float) and not isinstance(number, bool) and number > limit:
            raise sentence_error(f"a value above {limit} is not supported; send a smaller one")
        return number

    return BeforeValidator(check)


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("expected at least 1 (or -1 for the default)")
    return number


TokenLimit = Annotated[
    int, Field(ge=-1, lt=2**31, json_schema_extra={"not": {"const": 0}}), Whole, AfterValidator(_not_zero)
]
"""Most tokens of an answer; -1 stands for the default."""

GATEWAY_METADATA = "gateway"
"""Key of an interaction's metadata under which the gateway keeps what it needs to answer the same request again."""

MAX_CHOICES = 64
"""Most answers to one request: prompts times `n`."""

Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole, _at_most(MAX_CHOICES)]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole, _at_most(20)]


def _refuse_tool_turns(calls: Any) -> Any:
    if calls:
        raise sentence_error(
            "tool calls in earlier messages are not supported yet; send them and their results as text"
        )
    return calls


ToolTurns = Annotated[Annotated[list[Any], Field(max_length=0)] | None, BeforeValidator(_refuse_tool_turns)]
"""Earlier tool calls; only none are accepted."""


def _refuse_functions(given: Any) -> Any:
    if given and given not in ("none", "auto"):
        raise sentence_error("OpenAI's deprecated form of tools is not supported; send tools and tool_choice")
    return given


Status = Literal["recorded", "duplicate", "unmatched", "accepted"]


class Request(BaseModel):
    """Base class of all requests; rejects unknown fields and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OpenAIRequest(BaseModel):
    """Base class of OpenAI's requests and their parts: strict types, unknown fields are kept to be reported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


One = TypeVar("One")
Items = Annotated[list[One], Field(fail_fast=True)]
"""A list of which only the first invalid item is described: a body has room for a million of them."""


class TextPart(OpenAIRequest):
    """A text part of a message."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", None):
            raise sentence_error(f"found the type {short_repr(kind)}, but only 'text' is supported; send it as text")
        return part


def _refuse_tool_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise sentence_error(
            f"messages with the role {role!r} are not supported yet; send the result of the tool as text of the user"
        )
    return role


class ChatMessage(OpenAIRequest):
    """One message of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_refuse_tool_role)]
    content: Text | Items[TextPart] | None = Field(default=None, description="Null only in an assistant's message.")
    name: ShortText | None = None
    # Clients send earlier answers back with all their fields; these have no effect, or can only be empty.
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    confidence: float | None = None
    seed: int | None = None
    function_call: Annotated[None, BeforeValidator(_refuse_tool_turns)] = None
    tool_calls: ToolTurns = None

    @property
    def text(self) -> str:
        """The text of the message."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""

    @property
    def turn(self) -> Turn:
        """The message as it is recorded."""
        return Turn(role="system" if self.role == "developer" else self.role, content=self.text)


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        check_depth(schema)
    except RequestRefused as error:  # before anything else serializes it, which has other limits
        raise sentence_error(str(error)) from None
    json.dumps(schema, allow_nan=False)
    return schema


def _parsed(schema: Any) -> Any:
    """Return the schema of a JSON text, which vLLM accepts in the place of an object."""
    if isinstance(schema, str):
        with suppress(ValueError, RecursionError):
            return json.loads(schema)
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_finite)]
SchemaOrText = Annotated[Schema, BeforeValidator(_parsed, json_schema_input_type=dict[str, Any])]


class JsonSchema(OpenAIRequest):
    """A JSON Schema for the answer."""

    name: str = "answer"
    schema_: Schema = Field(alias="schema", description="JSON Schema to which the answer is constrained.")
    description: str | None = None
    strict: bool | None = None


class TextFormat(OpenAIRequest):
    """response_format for free text."""

    type: Literal["text"]


class JsonFormat(OpenAIRequest):
    """response_format for any JSON object, or for JSON of a schema, as llama.cpp's server has it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(default=None, alias="schema")


class SchemaFormat(OpenAIRequest):
    """response_format for JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


def _refuse_other_grammars(value: Any) -> Any:
    if value not in (None, "", []):
        raise sentence_error("only JSON Schemas are supported (json, guided_json, response_format)")
    return None


Empty = Literal[""] | Annotated[list[Any], Field(max_length=0)] | None
OtherGrammar = Annotated[None, BeforeValidator(_refuse_other_grammars, json_schema_input_type=Empty)]


class StructuredOutputs(OpenAIRequest):
    """vLLM's structured_outputs."""

    json_: SchemaOrText | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: OtherGrammar = None
    choice: OtherGrammar = None
    grammar: OtherGrammar = None
    structural_tag: OtherGrammar = None


class StreamOptions(OpenAIRequest):
    """What a stream contains in addition to the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _of_object(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of arguments, which are an object, with that type also if the client left it out."""
    if not parameters or "$ref" in parameters:  # in early drafts a $ref stands alone
        return parameters
    return {"type": "object", **parameters}


class FunctionDefinition(OpenAIRequest):
    """A function that the model may call."""

    name: str = Field(pattern="^[a-zA-Z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: Annotated[Schema, AfterValidator(_of_object)] | None = Field(
        default=None, description="JSON Schema of the arguments, an object; default: no arguments."
    )
    strict: bool | None = None


class Tool(OpenAIRequest):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(OpenAIRequest):
    """The name of a function."""

    name: str


class NamedTool(OpenAIRequest):
    """tool_choice for one function."""

    type: Literal["function"]
    function: NamedFunction


def refuse_other_choices(choice: Any) -> Any:
    """Return a `tool_choice`; raise a ValueError that names the supported ones if it is of another kind."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in ("none", "auto", "required", "function", None):
        raise sentence_error(f"found {short_repr(kind)}, expected 'none', 'auto', 'required', or one function")
    return choice


def _refuse_gateway_metadata(metadata: dict[str, Any] | None) -> None:
    if metadata and GATEWAY_METADATA in metadata:  # it says which API key may continue the conversation
        raise sentence_error(f"the key {GATEWAY_METADATA!r} is reserved for the gateway; use another one")


class Metadata(BaseModel):
    """Information about the request, which is recorded with the interaction."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    interaction_id: UUID | None = Field(default=None, description="Id for the interaction, instead of a new one.")
    domain: ShortText | None = None
    kind: ShortText | None = None
    retrieved_context: Text | None = None

    @model_validator(mode="after")
    def _not_the_gateways(self) -> "Metadata":
        _refuse_gateway_metadata(self.model_extra)
        return self


MAX_BIASES = 1000


def _pairs_as_object(bias: Any) -> Any:
    """Return llama.cpp's list of `[token, bias]` as OpenAI's object; its `false` excludes the token."""
    if isinstance(bias, dict | list) and len(bias) > MAX_BIASES:  # before each of them is validated
        raise sentence_error(f"found {len(bias):,} items, expected at most {MAX_BIASES}")
    pairs = bias.items() if isinstance(bias, dict) else bias
    with suppress(TypeError, ValueError):
        return {str(token): None if value is False else value for token, value in pairs}
    return bias


def _token_ids(bias: dict[str, float | None]) -> dict[str, float | None]:
    wrong = next((key for key in bias if not (key.isdecimal() and len(key) <= 9)), None)
    if wrong is not None:
        raise ValueError(f"expected ids of tokens, not {wrong[:40]!r}")
    return bias


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)] | None],
    Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    AfterValidator(_token_ids),
    BeforeValidator(_pairs_as_object),
]

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

Penalty = Annotated[float, Field(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Field(gt=0, le=10)]


class Generation(OpenAIRequest):
    """What requests of all APIs that generate have in common.

    `prepare` reads a request only through this class: these fields, and the properties that each API overrides.
    """

    model: ShortText = Field(min_length=1, description="A loop, a version (loop@v1.2.0), or an alias.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default 0, as in the evaluation.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0: only the most probable token.")
    top_k: Annotated[int, Field(ge=-1, lt=2**31), Whole] | None = Field(
        default=None, description="Number of most probable tokens to sample from; 0 and -1: all."
    )
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: RepeatPenalty | None = Field(default=None, description="llama.cpp's name of repetition_penalty.")
    repetition_penalty: RepeatPenalty | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**15), Whole] | None = Field(
        default=None, description="Tokens that repeat_penalty looks back at; default 64, -1: as many as possible."
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = Field(default=None, description="Bias by token id; null excludes the token.")
    seed: Annotated[int, Field(ge=-1, lt=SEEDS), Whole] | None = Field(
        default=None, description="Sampling seed. By default and with -1: a random seed, which is returned."
    )
    stop: Text | Annotated[Items[Text], Field(max_length=16)] | None = None
    ignore_eos: bool | None = Field(default=None, description="Never end before max_tokens or a stop text.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = Field(default=None, description="The user who wrote the prompt.")
    safety_identifier: ShortText | None = Field(default=None, description="Recorded as the user without `user`.")
    metadata: Metadata | None = None
    guided_json: SchemaOrText | None = Field(default=None, description="As response_format with this schema.")
    json_schema: SchemaOrText | None = Field(default=None, description="llama.cpp's name of guided_json.")
    guided_regex: OtherGrammar = None
    guided_choice: OtherGrammar = None
    guided_grammar: OtherGrammar = None
    grammar: OtherGrammar = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the model's chat template, such as enable_thinking."
    )
    cache_prompt: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def contradiction(self) -> tuple[str, str] | None:
        """A field and why its value is not supported together with the other fields; None if all fit together.

        Raises:
            ValueError: as `forced_function` does.
        """
        if (
            None not in (self.repeat_penalty, self.repetition_penalty)
            and self.repeat_penalty != self.repetition_penalty
        ):
            return "repeat_penalty", "repeat_penalty and repetition_penalty are the same; send one of them."
        if self.ignore_eos and self.answer_schema is not None:
            return "ignore_eos", "ignore_eos cannot be combined with a JSON Schema; leave one of them out."
        return None

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of a `GenerateRequest` that the request sets, apart from those that differ between answers."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repeat_penalty": self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty,
            "repeat_last_n": 2**15 if self.repeat_last_n == -1 else self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "ignore_eos": self.ignore_eos,
            "stop": self.stop_texts or None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "logprobs": self.logprobs_wanted or None,
            "top_logprobs": self.top_logprobs_wanted or None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def recorded(self) -> bool:
        """Return whether the answers are recorded."""
        return not self.scores_prompt

    @property
    def choices(self) -> int:
        """Number of answers to each conversation."""
        return 1

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of each answer; None for the loop's default."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Return whether the request scores the tokens of a raw prompt, which is no interaction."""
        return False

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema to which the answer is constrained."""
        outputs = self.structured_outputs
        given = [self.guided_json, self.json_schema, outputs.json_ if outputs else None]
        if outputs and outputs.json_object:
            given.append({"type": "object"})
        return next((schema for schema in given if schema is not None), None)

    @property
    def asks_for_text(self) -> bool:
        """Return whether the request asks for free text, so that the loop's schema does not constrain the answer."""
        return False

    @property
    def forced_function(self) -> FunctionDefinition | None:
        """The function whose arguments are the answer.

        Raises:
            ValueError: the request's choice of a function is not supported.
        """
        return None

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the answer: of the called function's arguments, or `output_schema`.

        Raises:
            ValueError: as `forced_function` does.
        """
        function = self.forced_function
        return self.output_schema if function is None else function.parameters or _NO_ARGUMENTS

    @property
    def logprobs_wanted(self) -> bool:
        """Return whether the answer contains log-probabilities."""
        return False

    @property
    def top_logprobs_wanted(self) -> int:
        """Number of most probable tokens to return at each position."""
        return 0

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def ignored_fields(self) -> list[str]:
        """The paths of unknown fields with a value, such as `top_a` and `messages.reasoning`; each once."""
        return list(dict.fromkeys(_unknown_fields(self)))


def _unknown_fields(value: "OpenAIRequest | list[OpenAIRequest]", path: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _unknown_fields(one, path)
    else:
        dot = path and f"{path}."
        yield from (f"{dot}{name}" for name, given in (value.model_extra or {}).items() if given is not None)
        for name in sorted(value.model_fields_set):
            given = value.__dict__.get(name)
            if isinstance(given, OpenAIRequest) or (
                type(given) is list and given and isinstance(given[0], OpenAIRequest)
            ):
                yield from _unknown_fields(given, f"{dot}{name}")


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation. The last message is the prompt and must be the user's; an assistant's message "
        "after it is the beginning of the answer, which the model continues."
    )
    max_tokens: TokenLimit | None = Field(default=None, description="Most tokens; -1: the loop's default.")
    max_completion_tokens: TokenLimit | None = None
    n_predict: TokenLimit | None = None
    n: Choices | None = Field(default=None, description="Number of answers; each is an interaction of its own.")
    response_format: TextFormat | JsonFormat | SchemaFormat | None = Field(default=None, discriminator="type")
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Items[Tool] | None = Field(default=None, description="Needs a tool_choice: none, or one function.")
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None, BeforeValidator(refuse_other_choices)
    ] = None
    functions: Annotated[Annotated[list[Any], Field(max_length=0)] | None, BeforeValidator(_refuse_functions)] = None
    function_call: Annotated[Literal["none", "auto"] | None, BeforeValidator(_refuse_functions)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """The one conversation."""
        return [self.messages]

    @property
    def choices(self) -> int:
        """Number of answers."""
        return self.n or 1

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of the answer."""
        return _first_limit(self.max_completion_tokens, self.max_tokens, self.n_predict)

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema to which the answer is constrained."""
        match self.response_format:
            case SchemaFormat(json_schema=given):
                return given.schema_
            case JsonFormat(schema_=schema):
                return schema or {"type": "object"}
            case _:
                return super().output_schema

    @property
    def asks_for_text(self) -> bool:
        """Return whether the response_format is text."""
        return isinstance(self.response_format, TextFormat)

    @property
    def forced_function(self) -> FunctionDefinition | None:
        """The function that `tool_choice` names, or the only one if one is required.

        Raises:
            ValueError: the model would have to choose, or there is no such function.
        """
        functions = [tool.function for tool in self.tools or ()]
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return named_function(functions, choice.function.name)
        return only_function(functions, choice)

    @property
    def logprobs_wanted(self) -> bool:
        """Return whether the answer contains log-probabilities."""
        return bool(self.logprobs)

    @property
    def top_logprobs_wanted(self) -> int:
        """Number of most probable tokens to return at each position."""
        return (self.top_logprobs or 0) if self.logprobs else 0


def named_function(functions: Sequence[FunctionDefinition], name: str) -> FunctionDefinition:
    """Return the function with this name.

    Raises:
        ValueError: there is none, or its arguments are not an object.
    """
    found = next((function for function in functions if function.name == name), None)
    if found is None:
        names = ", ".join(function.name for function in functions) or "none"
        raise ValueError(f"tool_choice names the function {name[:100]!r}, but the functions in tools are: {names}.")
    return _callable(found)


def _callable(function: FunctionDefinition) -> FunctionDefinition:
    """Return the function if its arguments are an object."""
    type = (function.parameters or {}).get("type", "object")
    if type != "object":
        raise ValueError(
            f"The parameters of the function {function.name!r} have the type {short_repr(type)}, expected 'object', "
            "whose properties are the arguments."
        )
    return function


def only_function(
    functions: Sequence[FunctionDefinition], choice: str | None, instead: str = "response_format"
) -> FunctionDefinition | None:
    """Return the function that is called under a tool_choice without a name; None if the answer is text.

    Args:
        instead: the field to use for what is not supported yet.

    Raises:
        ValueError: the model would have to choose, or there is no function, or its arguments are not an object.
    """
    if choice == "none" or (not functions and choice != "required"):
        return None
    if choice == "required" and len(functions) == 1:
        return _callable(functions[0])
    if not functions:
        raise ValueError("tool_choice 'required' needs a function in tools; add one, or leave tool_choice out.")
    raise ValueError(
        f"tool_choice {choice or 'auto'!r} with {counted(len(functions), 'function')} is not supported yet, use "
        f"{instead}. Supported are tool_choice 'none', a tool_choice that names one function, and 'required' with one "
        "function."
    )


def _first_limit(*limits: int | None) -> int | None:
    return next((limit for limit in limits if limit is not None and limit != -1), None)


PromptText = Annotated[Text, Field(min_length=1)]


class CompletionRequest(Generation):
    """POST /v1/completions. The prompt becomes a user's message, because the models are trained on conversations."""

    prompt: PromptText | Annotated[Items[PromptText], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: Annotated[int, Field(ge=-1, lt=2**31), Whole] | None = Field(
        default=None, description="Most tokens; -1: the loop's default. 0 only with echo and logprobs."
    )
    n_predict: TokenLimit | None = None
    n: Choices | None = Field(default=None, description="Number of answers to each prompt.")
    best_of: Choices | None = Field(default=None, description="Only the value of `n`.")
    echo: bool | None = Field(
        default=None,
        description="Return the prompt before the answer. With logprobs, the prompt is scored as it is, without the "
        "chat template, and nothing is recorded; that needs max_tokens 0 or 1.",
    )
    suffix: Literal[""] | None = None
    logprobs: TopLogprobs | None = None

    @property
    def contradiction(self) -> tuple[str, str] | None:
        """A field and why its value is not supported together with the other fields."""
        if self.best_of is not None and self.best_of != self.choices:
            return "best_of", f"best_of: only the value of n ({self.choices}) is supported; leave it out."
        if self.scores_prompt and self.completion_limit not in (0, 1):
            return "max_tokens", (
                "max_tokens: with echo and logprobs, which score the prompt without the chat template, it must be 0 or "
                "1. For an answer, leave echo or logprobs out."
            )
        if self.scores_prompt and self.stream:
            return "stream", "stream: is not supported together with echo and logprobs; leave it out."
        if not self.scores_prompt and self.completion_limit == 0:
            return "max_tokens", (
                "max_tokens: found 0, expected at least 1 (or -1 for the default); 0 needs echo and logprobs, which "
                "score the prompt."
            )
        return super().contradiction

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """One conversation for each prompt."""
        return [[ChatMessage(role="user", content=prompt)] for prompt in self.prompts]

    @property
    def scores_prompt(self) -> bool:
        """Return whether the request scores the tokens of its prompts."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of each answer."""
        return _first_limit(self.max_tokens, self.n_predict)

    @property
    def logprobs_wanted(self) -> bool:
        """Return whether the answer contains log-probabilities."""
        return self.logprobs is not None

    @property
    def top_logprobs_wanted(self) -> int:
        """Number of most probable tokens to return at each position."""
        return self.logprobs or 0


class InteractionIn(Interaction):
    """POST /v1/interactions: an answer that the application got elsewhere."""

    model_config = ConfigDict(strict=True)

    id: UUID | None = Field(  # type: ignore[assignment]
        default=None, description="Default: a new id. The same id sent twice is one interaction."
    )
    created_at: UtcDatetime | None = Field(default=None, description="Default: now.")  # type: ignore[assignment]
    # An event that claimed a declared source would be retracted at the next sync of that source.
    source: None = None
    provenance: None = None
    prompt_tokens: Annotated[Count, Whole] | None = None
    completion_tokens: Annotated[Count, Whole] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] | None = None

    @field_validator("metadata")
    @classmethod
    def _not_the_gateways(cls, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
        _refuse_gateway_metadata(metadata)
        return metadata


def _kinds_with(*kinds: FeedbackKind, **needs: dict[str, Any]) -> dict[str, Any]:
    return {"properties": {"kind": {"enum": list(kinds)}, **needs}, "required": ["kind", *needs]}


_REQUIRED_BY_KIND: dict[str, Any] = {
    "anyOf": [
        _kinds_with("thumbs_up", "thumbs_down"),
        _kinds_with("correction", correction={"type": "string", "pattern": r"\S"}),
        _kinds_with("success", "validation_failure", score={"type": "number"}),
        _kinds_with("rating", rating={"type": "string"}),
        _kinds_with("reward", reward={"type": "number"}),
    ]
}
"""The fields that each kind of feedback requires, for OpenAPI; `records.Feedback` enforces them."""


class FeedbackIn(Request):
    """POST /v1/feedback. The same id sent twice is one feedback, so clients can safely retry."""

    model_config = ConfigDict(json_schema_extra=_REQUIRED_BY_KIND)

    loop: str | None = Field(
        default=None, max_length=60, description="Name of the loop; default: the interaction's loop."
    )
    id: UUID | None = None
    interaction_id: UUID
    created_at: UtcDatetime | None = None
    kind: FeedbackKind
    score: float | None = Field(default=None, ge=0, le=100)
    rating: GivenRating | None = None
    reward: float | None = Field(default=None, ge=-1, le=1)
    correction: Text | None = None
    output_hash: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    user: ShortText | None = None
    metadata: EventMetadata | None = None


class AdminRequest(Request):
    """POST /admin/reload-model and POST /admin/rollback."""

    loop: str | None = Field(
        default=None, max_length=60, description="Name of the loop; not needed if only one is served."
    )
    reason: Annotated[Text, Field(min_length=1, max_length=500)] = "requested through the gateway"


class Receipt(BaseModel):
    """The result of sending an event."""

    id: UUID
    status: Status = Field(
        description="recorded; duplicate: it was recorded before; unmatched: its interaction has not arrived; "
        "accepted: it is in the write-ahead log, and not in the store yet."
    )
    message: str | None = Field(default=None, description="What an unmatched status means for this event.")


class InteractionOut(BaseModel):
    """GET /v1/interactions/{id}."""

    interaction: Interaction
    feedback: list[Feedback]
    reward: float | None = Field(description="Resolved reward of all feedback; null without an example.")
    target: str | None = Field(description="The completion to train on; null without an example.")


class StatsOut(BaseModel):
    """GET /v1/feedback/stats."""

    loop: str
    interactions: int
    feedback: int
    by_kind: dict[str, int]
    examples: int
    corrected: int
    implicit: int = Field(description="Examples of answers that nobody objected to.")
    rewarded: int
    unmatched: int = Field(description="Feedback whose interaction has not arrived.")
    flagged: int = Field(description="Interactions flagged for review.")
    pending_bytes: int = Field(description="Events in the write-ahead log that are not in the store yet.")


class ModelInService(BaseModel):
    """The model in service after a reload or rollback."""

    loop: str
    serving: str | None
    last_error: str | None = Field(description="Why the champion does not serve; null if it does.")


class ModelEntry(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "finetune-pipeline"
    loop: str
    serving: str | None = Field(description="The model that answers under this name now.")


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class LoopHealth(BaseModel):
    """One loop of GET /healthz."""

    serving: str | None = Field(description="The model in service; null if none can answer.")
    last_error: str | None = Field(description="Why the loop is not healthy; null if it is.")
    in_flight: int


class Health(BaseModel):
    """GET /healthz."""

    status: Literal["ok", "degraded", "unavailable"]
    loops: dict[str, LoopHealth]
    recording: str | None = Field(description="Why events cannot be recorded; null if they can.")


class ErrorDetail(BaseModel):
    """Why the request failed."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error response."""

    error: ErrorDetail
