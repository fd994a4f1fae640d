"""The schemas of requests and responses: OpenAI's, as far as a local model supports them, and the feedback API's.

OpenAI's fields that do not change the answer are accepted and ignored. Fields that would change it and are not
supported (tools, n > 1, penalties, ...) are accepted only with values that have no effect. Unknown fields are rejected.
"""

import json
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from finetune_pipeline.inference.protocol import SEEDS
from finetune_pipeline.records import (
    Count,
    Feedback,
    FeedbackKind,
    GivenRating,
    Interaction,
    ShortText,
    Text,
    Turn,
    UtcDatetime,
)
from finetune_pipeline.validation_messages import sentence_error


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = BeforeValidator(_whole)
"""Accepts 5.0 as 5, because JSON has only one type of number."""


def _at_most(limit: int) -> BeforeValidator:
    """Return a validator that refuses larger numbers, which no model supports, by name."""

    def check(number: Any) -> Any:
        if isinstance(number, int | float) and not isinstance(number, bool) and number > limit:
            raise sentence_error(f"a value above {limit} is not supported; leave it out")
        return number

    return BeforeValidator(check)


Empty = Annotated[list[Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0), _at_most(0)] | None

Status = Literal["recorded", "duplicate", "unmatched", "accepted"]


class Request(BaseModel):
    """Base class of all requests; rejects unknown fields and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Request):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: ShortText | None = None
    # Clients send earlier answers back with all their fields; here these can only be empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Empty = None
    tool_calls: Empty = None

    @property
    def text(self) -> str:
        """The text of the message."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> Turn:
        """The message as it is recorded."""
        return Turn(role="system" if self.role == "developer" else self.role, content=self.text)


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    json.dumps(schema, allow_nan=False)
    return schema


class JsonSchema(Request):
    """A JSON Schema for the answer."""

    name: str = "answer"
    schema_: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(
        alias="schema", description="JSON Schema to which the answer is constrained."
    )
    description: str | None = None
    strict: bool | None = None


class TextFormat(Request):
    """response_format for free text."""

    type: Literal["text"]


class JsonFormat(Request):
    """response_format for any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Request):
    """response_format for JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Request):
    """What a stream contains in addition to the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Metadata(Request):
    """Information about the request; these fields are recorded with the interaction, others are ignored."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, str]

    domain: ShortText | None = None
    kind: ShortText | None = None
    retrieved_context: Text | None = None


class Generation(Request):
    """The fields that chat completions and completions share."""

    model: ShortText = Field(min_length=1, description="A loop, a version (loop@v1.2.0), or an alias.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), Whole] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default 0, as in the evaluation.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Annotated[int, Field(ge=-1, lt=SEEDS), Whole] | None = Field(
        default=None, description="Sampling seed. By default and with -1: a random seed, which is returned."
    )
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = Field(default=None, description="The user who wrote the prompt.")
    metadata: Metadata | None = None
    n: Annotated[int, Field(ge=1, le=1), Whole, _at_most(1)] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation; the last message is the prompt and must be the user's."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), Whole] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = Field(default=None, discriminator="type")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), Whole, _at_most(0)] | None = None
    tools: Empty = None
    functions: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def completion_limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def output_schema(self) -> dict[str, Any] | None:
        """The JSON Schema to which the answer is constrained."""
        match self.response_format:
            case SchemaFormat(json_schema=given):
                return given.schema_
            case JsonFormat():
                return {"type": "object"}
            case _:
                return None


class CompletionRequest(Generation):
    """POST /v1/completions. The prompt becomes a user's message, because the models are trained on conversations."""

    prompt: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    best_of: Annotated[int, Field(ge=1, le=1), Whole, _at_most(1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    logprobs: Annotated[int, Field(ge=0, le=0), Whole, _at_most(0)] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


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


class InteractionOut(BaseModel):
    """GET /v1/interactions/{id}."""

    interaction: Interaction
    feedback: list[Feedback]
    reward: float | None = Field(description="Resolved reward of all feedback; null without feedback.")
    target: str | None = Field(description="The completion to train on; null without feedback.")


class StatsOut(BaseModel):
    """GET /v1/feedback/stats."""

    loop: str
    interactions: int
    feedback: int
    by_kind: dict[str, int]
    examples: int
    corrected: int
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
