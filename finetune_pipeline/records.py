"""Records shared by all packages: interactions, feedback, and the examples made from them."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import from_json

from finetune_pipeline.validation_messages import short_repr

Rating = Literal["1", "2", "3", "4", "5", "gold"]


def _stars_as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value  # not a bool, which is an int too


RatingKey = Annotated[Rating, BeforeValidator(_stars_as_text)]
"""A rating as the key of a YAML mapping, where stars may be numbers."""

GivenRating = Annotated[Rating, BeforeValidator(_stars_as_text, json_schema_input_type=Rating | Literal[1, 2, 3, 4, 5])]
"""A rating as an application gives it: stars may be numbers."""

Message = dict[str, str]
"""One chat message: `role` (system, user or assistant) and `content`."""

FeedbackKind = Literal["success", "correction", "validation_failure", "thumbs_up", "thumbs_down", "rating", "reward"]
ReviewKind = Literal["approve", "edit", "reject"]
ASK = "ask"
"""The variant of interactions that `finetune ask` records."""
PERSON_KINDS = frozenset({"correction", "thumbs_up", "thumbs_down", "rating"})


def _storable(text: str) -> str:
    # PostgreSQL cannot store NUL, and UTF-8 cannot encode an unpaired surrogate. No real prompt has either.
    if "\x00" in text:
        raise ValueError("contains a NUL character, which cannot be stored; remove it")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains an unpaired surrogate, which is not a valid character; remove it")
    return text


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is before the year 1 or after the year 9999 in UTC") from None


CLOCK_SKEW = timedelta(minutes=10)
"""How far ahead of this machine's clock an event may be. A user's later feedback replaces earlier feedback, so
feedback from the future would outrank everything that the user says until then."""


def is_in_future(moment: datetime) -> bool:
    """Return whether a time is ahead by more than CLOCK_SKEW; a time without a time zone is UTC."""
    # Not converted to UTC: there it could be after the year 9999, which `datetime` cannot represent.
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return aware > datetime.now(UTC) + CLOCK_SKEW


def not_in_future(moment: datetime) -> datetime:
    """Return a time unchanged.

    Raises:
        ValueError: it is in the future.
    """
    if is_in_future(moment):
        raise ValueError(
            f"{_in_utc(moment).isoformat()} is in the future (now it is {datetime.now(UTC).isoformat()}; a time "
            "without a time zone is UTC); leave it out, or fix the clock or the time zone where it was written"
        )
    return moment


# JSON Schema can express the rule on NUL, but not the one on surrogates.
_NO_NUL = {"pattern": r"^[^\u0000]*$"}

Text = Annotated[str, Field(json_schema_extra=_NO_NUL), AfterValidator(_storable)]
ShortText = Annotated[str, Field(max_length=200, json_schema_extra=_NO_NUL), AfterValidator(_storable)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
UtcDatetime = Annotated[datetime, AfterValidator(_in_utc)]
PastUtcDatetime = Annotated[UtcDatetime, AfterValidator(not_in_future)]


MAX_METADATA_BYTES = 4_096
"""The most bytes of an event's metadata, as JSON in UTF-8."""


def _bounded(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        text = _storable(json.dumps(metadata, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ValueError("is nested too deeply; flatten it") from None
    if "\\u0000" in text:
        raise ValueError("contains a NUL character, which cannot be stored; remove it")
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"has {size:,} bytes as JSON, at most {MAX_METADATA_BYTES:,} are kept; leave something out")
    return metadata


EventMetadata = Annotated[dict[str, JsonValue], AfterValidator(_bounded)]


class Record(BaseModel):
    """Base class of all records: frozen, without unknown keys or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Turn(Record):
    """One earlier message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Interaction(Record):
    """One logged prompt and answer."""

    event: Literal["interaction"] = "interaction"
    id: UUID = Field(description="Id, chosen by the application; a repeated id is recorded once.")
    loop: str = Field(max_length=60, description="Name of the loop.")
    created_at: UtcDatetime
    prompt: Text = Field(min_length=1, description="What the user asked, without the loop's system prompt.")
    history: tuple[Turn, ...] = Field(
        default=(),
        description="Messages before the prompt; a system message replaces the loop's system prompt.",
        fail_fast=True,
    )
    output: Text = Field(description="The model's answer.")
    model: ShortText | None = Field(default=None, description="The model that answered: loop@version.")
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among the value tokens.")
    validation_score: float | None = Field(
        default=None, ge=0, le=100, description="Score of a validator at answer time, 0 to 100."
    )
    user: ShortText | None = Field(default=None, description="Author of the prompt.")
    domain: ShortText | None = None
    kind: ShortText | None = Field(default=None, description="Kind of request, in the application's terms.")
    retrieved_context: Text | None = Field(default=None, description="Retrieved text that was put into the prompt.")
    source: ShortText | None = Field(
        default=None, description="The declared source it came from; null if an application logged it."
    )
    provenance: Text | None = Field(
        default=None, max_length=1_000, description="Where in that source: note, file and line, or row key."
    )
    variant: ShortText | None = Field(
        default=None, description="Traffic variant the request was routed to, such as champion."
    )
    flag: ShortText | None = Field(default=None, description="Reason why a person should review the answer.")
    latency_ms: float | None = Field(default=None, ge=0)
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Sampling seed; null at temperature 0, or if unknown.",
    )
    metadata: EventMetadata | None = Field(
        default=None, description="Further facts of the application, as a JSON object; kept, and never trained on."
    )


class Feedback(Record):
    """What a person or a validator said about one interaction."""

    event: Literal["feedback"] = "feedback"
    id: UUID = Field(description="Id, chosen by the application; a repeated id is recorded once.")
    loop: str = Field(max_length=60, description="Name of the loop.")
    interaction_id: UUID
    created_at: UtcDatetime
    kind: FeedbackKind
    score: float | None = Field(default=None, ge=0, le=100, description="For success and validation_failure: 0 to 100.")
    rating: GivenRating | None = Field(default=None, description="For rating: 1 to 5 stars, or gold.")
    reward: float | None = Field(
        default=None, ge=-1, le=1, description="A reward of the application's own; replaces the computed one."
    )
    correction: Text | None = Field(default=None, description="The corrected answer.")
    output_hash: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="text_hash of the answer it is about; default: the logged output.",
    )
    user: ShortText | None = None
    metadata: EventMetadata | None = Field(
        default=None, description="Further facts of the application, as a JSON object; kept, and never trained on."
    )

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "Feedback":
        if self.kind == "correction" and not (self.correction and self.correction.strip()):
            raise ValueError("kind correction needs the corrected answer in `correction`")
        if self.kind in {"success", "validation_failure"} and self.score is None:
            raise ValueError(f"kind {self.kind} needs `score`, 0 to 100")
        if self.kind == "rating" and self.rating is None:
            raise ValueError("kind rating needs `rating`: 1, 2, 3, 4, 5 or gold")
        if self.kind == "reward" and self.reward is None:
            raise ValueError("kind reward needs `reward`, -1 to 1")
        return self


Event = Annotated[Interaction | Feedback, Field(discriminator="event")]


def validate_application_event(event: Interaction | Feedback) -> Interaction | Feedback:
    """Return an application's event unchanged, or raise if it has a field that only a source sync may set.

    An event that claimed a declared source would be retracted at the next sync of that source.

    Raises:
        ValueError: it has a source or a provenance, or its time is in the future.
    """
    try:
        not_in_future(event.created_at)
    except ValueError as error:
        raise ValueError(f"created_at: {error}") from None
    if isinstance(event, Interaction) and (event.source is not None or event.provenance is not None):
        raise ValueError(
            "source, provenance: set only for interactions from declared sources and dropped files; leave them out"
        )
    return event


class Example(Record):
    """One training row: the prompt of an interaction and the target answer after all its feedback."""

    INTERACTION_FIELDS: ClassVar = frozenset(
        {"created_at", "prompt", "history", "output", "source", "provenance", "user", "domain", "kind"}
    )

    interaction_id: UUID
    ingest_offset: int = Field(ge=0, description="Ingest offset of the newest event that it depends on.")
    created_at: UtcDatetime = Field(description="As of the interaction. By it, examples are older or newer.")
    prompt: str
    history: tuple[Turn, ...] = ()
    output: str = Field(description="The model's answer; it is the target unless somebody corrected it.")
    target: str
    reward: float = Field(ge=-1, le=1)
    confidence: float | None = Field(default=None, ge=0, le=1)
    confirmed: bool = Field(description="A person confirmed the target.")
    corrected: bool = Field(description="A person wrote the target.")
    implicit: bool = Field(default=False, description="It exists only because nobody objected to the answer in time.")
    source: str | None = Field(default=None, description="As of the interaction.")
    provenance: str | None = Field(default=None, description="As of the interaction.")
    user: str | None = Field(default=None, description="As of the interaction.")
    domain: str | None = Field(default=None, description="As of the interaction.")
    kind: str | None = Field(default=None, description="As of the interaction.")
    review: ReviewKind | None = Field(default=None, description="The reviewer's decision; null without one.")

    @classmethod
    def from_interaction(cls, interaction: Interaction, **fields: Any) -> "Example":
        """Return an interaction's example; `fields` are those that do not come from the interaction."""
        copied = {name: getattr(interaction, name) for name in cls.INTERACTION_FIELDS}
        return cls(interaction_id=interaction.id, **copied, **fields)

    def qualifies(self, min_reward: float) -> bool:
        """Return whether it may train: by its reward, a correction, or a reviewer's approval.

        `feedback.store.qualifies` is the same as a condition of SQL.
        """
        return self.review != "reject" and (self.corrected or self.review is not None or self.reward >= min_reward)


def normalize(text: str) -> str:
    """Return a text in the form in which prompts are compared: NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> str:
    """Return the SHA-256 (hex) of the normalized text."""
    return hashlib.sha256(normalize(text).encode()).hexdigest()


_JSON = json.JSONEncoder(sort_keys=True)


def canonical_answer(answer: str) -> str:
    """Return an answer in the form in which answers are compared: stripped, and JSON in one notation.

    The same JSON with other white space, another order of keys or other escapes has the same form.
    """
    text = answer.strip()
    if text[:1] in {"{", "["}:
        with suppress(ValueError, RecursionError):
            return _JSON.encode(from_json(text))
    return text


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers are the same text, but for white space around it, or the same JSON."""
    return one.strip() == other.strip() or canonical_answer(one) == canonical_answer(other)


def conversation_text(prompt: str, history: Sequence[Turn]) -> str:
    """Return a prompt and the messages before it as one text, by which prompts are compared."""
    return "\n".join([*(f"{turn.role}: {turn.content}" for turn in history), prompt])


def chat_messages(system_prompt: str, prompt: str, history: Sequence[Turn] = ()) -> list[Message]:
    """Return the chat messages for a prompt; training, evaluation and serving all use this function.

    A system message in the history replaces the loop's system prompt.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in history]
    if system_prompt and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return [*messages, {"role": "user", "content": prompt}]


def without_system_prompt(prompt: str, history: Sequence[Turn], system_prompt: str) -> tuple[str, tuple[Turn, ...]]:
    """Return prompt and history without the loop's system prompt, which `chat_messages` adds again.

    Files made elsewhere contain it as the system message, or as the instruction before the prompt (see `alpaca`). A
    prompt that consists of nothing else becomes empty.
    """
    if not system_prompt:
        return prompt, tuple(history)
    if history and history[0].role == "system":
        return prompt, tuple(history[1:] if history[0].content == system_prompt else history)
    return "" if prompt == system_prompt else prompt.removeprefix(f"{system_prompt}\n\n"), tuple(history)


LOSS_MASK_FIELDS = ("weight", "train", "trainable", "loss")
"""Fields by which a turn, or a row, excludes its answer from the loss."""

_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def loss_mask_field(fields: Mapping[str, Any]) -> str:
    """Return the field that excludes an answer from the loss, such as "weight: 0"; empty if there is none.

    The fields are OpenAI's `weight`, and `train`, `trainable` or `loss` of other trainers. Values are booleans or
    numbers, in CSV files as text.

    Raises:
        ValueError: the value of such a field is neither a boolean nor a number.
    """
    for name in LOSS_MASK_FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        trained = _BOOLEANS.get(str(value).strip().casefold())
        if trained is None:
            try:
                trained = float(value) > 0
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name}: found {short_repr(value)}, expected true or 1 (trained on), false or 0 (context only)"
                ) from None
        if not trained:
            return f"{name}: {value}"
    return ""
