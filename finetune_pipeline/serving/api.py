"""What requests and responses look like: OpenAI's forms, as far as a local model can mean them, and the feedback's.

Fields of OpenAI's that cannot change an answer here are taken and left alone; fields that would change it and cannot be
honoured (tools, n > 1, penalties, ...) are refused unless they ask for nothing; others are unknown and refused.
"""

import json
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from finetune_pipeline.inference.protocol import SEEDS
from finetune_pipeline.records import Feedback, FeedbackKind, Interaction, Rating, ShortText, Text, Turn, UtcDatetime


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = BeforeValidator(_whole)
"""5.0 is 5: JSON knows no difference."""

Nothing = Annotated[list[Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


Status = Literal["recorded", "duplicate", "waiting", "accepted"]


class Request(BaseModel):
    """Base of all requests: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: ShortText | None = None
    # An answer of before comes back with all its fields; here they can only be empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> Turn:
        """The message as it is recorded."""
        return Turn(role="system" if self.role == "developer" else self.role, content=self.text)


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    json.dumps(schema, allow_nan=False)
    return schema


class JsonSchema(Request):
    """The form of an answer."""

    name: str = "answer"
    schema_: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(
        alias="schema", description="JSON Schema that the answer can only follow."
    )
    description: str | None = None
    strict: bool | None = None


class TextFormat(Request):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Request):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Request):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Request):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Metadata(Request):
    """What the application says of the request: these are kept with the interaction, others are left alone."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, str]

    domain: ShortText | None = None
    kind: ShortText | None = None
    retrieved_context: Text | None = None


class Generation(Request):
    """What chat completions and completions have in common."""

    model: ShortText = Field(min_length=1, description="A loop, loop@version, or an alias.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), Whole] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, description="Default 0: as it was measured.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Annotated[int, Field(ge=-1, lt=SEEDS), Whole] | None = Field(
        default=None, description="Seed of the sampling. By default, and with -1: a random seed, which is returned."
    )
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = Field(default=None, description="Whose words the prompt are.")
    metadata: Metadata | None = None
    n: Annotated[int, Field(ge=1, le=1), Whole] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation; what the user says last is the prompt."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), Whole] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = Field(default=None, discriminator="type")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), Whole] | None = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON Schema that the answer has to follow."""
        match self.response_format:
            case SchemaFormat(json_schema=wanted):
                return wanted.schema_
            case JsonFormat():
                return {"type": "object"}
            case _:
                return None


class CompletionRequest(Generation):
    """POST /v1/completions. The prompt is taken as what a user says: these models were trained on conversations."""

    prompt: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    best_of: Annotated[int, Field(ge=1, le=1), Whole] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    logprobs: Annotated[int, Field(ge=0, le=0), Whole] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class InteractionIn(Request):
    """POST /v1/interactions: an exchange that the application had elsewhere."""

    loop: str = Field(max_length=60, description="Name of the loop.")
    id: UUID | None = Field(default=None, description="Default a new one; the same id twice is one interaction.")
    created_at: UtcDatetime | None = None
    prompt: Text = Field(min_length=1)
    history: list[Turn] = []
    output: Text
    model: ShortText | None = None
    confidence: float | None = Field(default=None, ge=0, le=1)
    validation_score: float | None = Field(default=None, ge=0, le=100)
    user: ShortText | None = None
    domain: ShortText | None = None
    kind: ShortText | None = None
    retrieved_context: Text | None = None
    variant: ShortText | None = None
    flag: ShortText | None = None
    latency_ms: float | None = Field(default=None, ge=0)
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole] | None = None
    completion_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), Whole] | None = None


def _of_kinds(*kinds: FeedbackKind, **needs: dict[str, Any]) -> dict[str, Any]:
    return {"properties": {"kind": {"enum": list(kinds)}, **needs}, "required": ["kind", *needs]}


_NEEDED: dict[str, Any] = {
    "anyOf": [
        _of_kinds("thumbs_up", "thumbs_down"),
        _of_kinds("correction", correction={"type": "string", "pattern": r"\S"}),
        _of_kinds("success", "validation_failure", score={"type": "number"}),
        _of_kinds("rating", rating={"type": "string"}),
        _of_kinds("reward", reward={"type": "number"}),
    ]
}
"""What each kind of feedback needs, for the description; `records.Feedback` asks for it."""


class FeedbackIn(Request):
    """POST /v1/feedback. The same id twice is one feedback, so a client can safely try again."""

    model_config = ConfigDict(json_schema_extra=_NEEDED)

    loop: str | None = Field(default=None, max_length=60, description="Name of the loop; default the interaction's.")
    id: UUID | None = None
    interaction_id: UUID
    created_at: UtcDatetime | None = None
    kind: FeedbackKind
    score: float | None = Field(default=None, ge=0, le=100)
    rating: Rating | None = None
    reward: float | None = Field(default=None, ge=-1, le=1)
    correction: Text | None = None
    output_hash: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    user: ShortText | None = None


class AdminRequest(Request):
    """POST /admin/..."""

    loop: str | None = Field(default=None, max_length=60, description="Not needed while one loop is served.")
    reason: Annotated[Text, Field(min_length=1, max_length=500)] = "asked for through the gateway"


class Receipt(BaseModel):
    """What became of an event."""

    id: UUID
    status: Status = Field(
        description="waiting: the interaction has not arrived; accepted: safe, and not in the store yet."
    )


class InteractionOut(BaseModel):
    """GET /v1/interactions/{id}."""

    interaction: Interaction
    feedback: list[Feedback]
    reward: float | None = Field(description="What all feedback together gives; null without any.")
    target: str | None = Field(description="The answer that it teaches; null without feedback.")


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
    flagged: int = Field(description="Interactions that a person should look at.")
    pending_bytes: int = Field(description="In the journal, and not in the store yet.")


class Moved(BaseModel):
    """What serves after an administrator's call."""

    loop: str
    serving: str
    trouble: str | None


class ModelCard(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "finetune-pipeline"
    loop: str
    serving: str | None = Field(description="What answers under this name now.")


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoopHealth(BaseModel):
    """One loop of GET /healthz."""

    serving: str | None
    trouble: str | None
    in_flight: int


class Health(BaseModel):
    """GET /healthz."""

    status: Literal["ok", "degraded", "unavailable"]
    loops: dict[str, LoopHealth]
    recording: str | None = Field(description="What keeps events from the store; null when nothing does.")


class ErrorDetail(BaseModel):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer other than 2xx."""

    error: ErrorDetail
