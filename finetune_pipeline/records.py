"""What crosses rooms: the events that arrive, the example that they become, and the manifest of each stage."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Rating = Literal["1", "2", "3", "4", "5", "gold"]
Message = dict[str, str]
"""One chat message: `role` (system, user or assistant) and `content`."""

FeedbackKind = Literal["success", "correction", "validation_failure", "thumbs_up", "thumbs_down", "rating", "reward"]
ReviewKind = Literal["approve", "edit", "reject"]
PERSON_KINDS = frozenset({"correction", "thumbs_up", "thumbs_down", "rating"})


def _storable(text: str) -> str:
    # PostgreSQL cannot hold NUL, UTF-8 no half of a surrogate pair, and no real prompt has either.
    if "\x00" in text:
        raise ValueError("holds a NUL character, which no store can keep; remove it")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is no character; remove it")
    return text


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies before the year 1 or after the year 9999 in UTC") from None


CLOCK_SKEW = timedelta(minutes=10)
"""How far ahead the clock of an event's source may be. Later feedback outranks earlier feedback, so feedback from the
future would outrank all that is given until then."""


def is_in_future(moment: datetime) -> bool:
    """Return whether a time is ahead by more than CLOCK_SKEW; a time without a zone is UTC."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment  # in UTC it may lie after the year 9999
    return aware > datetime.now(UTC) + CLOCK_SKEW


def not_in_future(moment: datetime) -> datetime:
    """Return a time unchanged.

    Raises:
        ValueError: it is in the future.
    """
    if is_in_future(moment):
        raise ValueError(
            f"{_in_utc(moment).isoformat()} is in the future (here it is {datetime.now(UTC).isoformat()}; a time "
            "without a zone is UTC); leave it out, or fix the clock or the time zone of its source"
        )
    return moment


_NO_NUL = {"pattern": r"^[^\u0000]*$"}
"""What of it a JSON Schema can say."""

Text = Annotated[str, Field(json_schema_extra=_NO_NUL), AfterValidator(_storable)]
ShortText = Annotated[str, Field(max_length=200, json_schema_extra=_NO_NUL), AfterValidator(_storable)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Moment = Annotated[datetime, AfterValidator(_in_utc)]
PastMoment = Annotated[Moment, AfterValidator(not_in_future)]


class Record(BaseModel):
    """Base of all records: frozen, unknown keys refused, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Turn(Record):
    """One earlier message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Interaction(Record):
    """One exchange with a model in service, as an application logs it."""

    event: Literal["interaction"] = "interaction"
    id: UUID = Field(description="Id of the interaction, given by who logs it; the same id twice is one interaction.")
    loop: str = Field(max_length=60, description="Name of the loop.")
    created_at: Moment
    prompt: Text = Field(min_length=1, description="What the user asked, without the loop's system prompt.")
    history: tuple[Turn, ...] = Field(
        default=(), description="Messages before the prompt; one of the system stands instead of the loop's own."
    )
    output: Text = Field(description="What the model answered.")
    model: ShortText | None = Field(default=None, description="Which model answered: loop@version.")
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among value tokens.")
    validation_score: float | None = Field(default=None, ge=0, le=100, description="What a validator gave on the spot.")
    user: ShortText | None = Field(default=None, description="The author: whose words the prompt are.")
    domain: ShortText | None = None
    kind: ShortText | None = Field(default=None, description="Kind of request, in the application's own terms.")
    retrieved_context: Text | None = Field(default=None, description="What was retrieved and put into the prompt.")
    source: ShortText | None = Field(
        default=None, description="Which declared source it was made from; none: an application logged it."
    )
    provenance: Text | None = Field(
        default=None, max_length=1_000, description="Where in that source: a note, a file and line, a row's key."
    )
    variant: ShortText | None = Field(
        default=None, description="Traffic variant: what was meant to answer, such as champion."
    )
    flag: ShortText | None = Field(default=None, description="Why a person should look at the answer.")
    latency_ms: float | None = Field(default=None, ge=0)
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Seed that the answer was sampled with; null: temperature 0, or unknown.",
    )


class Feedback(Record):
    """What a person or a validator thought of one answer."""

    event: Literal["feedback"] = "feedback"
    id: UUID = Field(description="Id of this feedback; the same id twice is one feedback.")
    loop: str = Field(max_length=60, description="Name of the loop.")
    interaction_id: UUID
    created_at: Moment
    kind: FeedbackKind
    score: float | None = Field(default=None, ge=0, le=100, description="Of success and validation_failure.")
    rating: Rating | None = Field(default=None, description="Of rating: 1 to 5 stars, or gold.")
    reward: float | None = Field(
        default=None, ge=-1, le=1, description="The reward, where the application knows it better than the table."
    )
    correction: Text | None = Field(default=None, description="The answer as it should have been.")
    output_hash: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="text_hash of the output it speaks of; default the logged.",
    )
    user: ShortText | None = None

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


def logged(event: Interaction | Feedback) -> Interaction | Feedback:
    """Return an event of an application unchanged.

    It must not claim a declared source: it would be retracted as soon as that source is read.

    Raises:
        ValueError: it has a source or an provenance, or its time is in the future.
    """
    try:
        not_in_future(event.created_at)
    except ValueError as error:
        raise ValueError(f"created_at: {error}") from None
    if isinstance(event, Interaction) and (event.source is not None or event.provenance is not None):
        raise ValueError(
            "source, provenance: only what a loop's declared sources and dropped files give has them; leave them out"
        )
    return event


class Example(Record):
    """What one interaction teaches, after all its feedback: a prompt and the answer that it should get."""

    interaction_id: UUID
    ingest_offset: int = Field(ge=0, description="The store's ingest offset of the newest event that shaped it.")
    prompt: str
    history: tuple[Turn, ...] = ()
    output: str = Field(description="What the model itself answered; the target where nobody corrected it.")
    target: str
    reward: float = Field(ge=-1, le=1)
    confidence: float | None = Field(default=None, ge=0, le=1)
    confirmed: bool = Field(description="A person found the answer right.")
    corrected: bool = Field(description="A person wrote the target.")
    source: str | None = Field(default=None, description="The declared source; none: an application logged it.")
    provenance: str | None = Field(default=None, description="Where in that source.")
    review: ReviewKind | None = Field(default=None, description="What a reviewer decided; none: nobody did.")


def example_of(interaction: Interaction, **taught: Any) -> Example:
    """The example of an interaction: what was asked and answered, and the fields `taught` that say what it teaches."""
    asked = {name: getattr(interaction, name) for name in ("source", "provenance", "prompt", "history", "output")}
    return Example(interaction_id=interaction.id, **asked, **taught)


def normalise(text: str) -> str:
    """The form in which prompts are compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> str:
    """SHA-256 (hex) of the normalised text."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def conversation(prompt: str, history: Sequence[Turn]) -> str:
    """A prompt with what was said before it, as one text: what tells two questions apart."""
    return "\n".join([*(f"{turn.role}: {turn.content}" for turn in history), prompt])


def chat(system_prompt: str, prompt: str, history: Sequence[Turn] = ()) -> list[Message]:
    """The messages that a loop sends for a prompt; the same in training, evaluation and service.

    A system message of the history stands instead of the loop's own.
    """
    earlier = [{"role": turn.role, "content": turn.content} for turn in history]
    own = bool(earlier) and earlier[0]["role"] == "system"
    system = [{"role": "system", "content": system_prompt}] if system_prompt and not own else []
    return [*system, *earlier, {"role": "user", "content": prompt}]


def without_system_prompt(prompt: str, history: Sequence[Turn], system_prompt: str) -> tuple[str, tuple[Turn, ...]]:
    """A conversation as a loop keeps it: without the loop's own system prompt, which `chat` adds.

    Files made elsewhere have it as the system message, or as the instruction before the prompt (`alpaca_prompt`). Where
    it is all that is there, nothing was asked, and the prompt is empty.
    """
    if not system_prompt:
        return prompt, tuple(history)
    if history and history[0].role == "system":
        return prompt, tuple(history[1:] if history[0].content == system_prompt else history)
    return "" if prompt == system_prompt else prompt.removeprefix(f"{system_prompt}\n\n"), tuple(history)


def alpaca_prompt(instruction: Any, asked: Any) -> str:
    """The prompt of an Alpaca row: the instruction, and what it is to be done with.

    Raises:
        ValueError: they are no texts.
    """
    parts = (instruction, asked or "")
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction and input: expected two texts")
    return "\n\n".join(part for part in parts if part)


NOT_TRAINED = ("weight", "train", "trainable", "loss")
"""Fields by which a turn, or a row, says that its answer is not to be trained on."""
_TRAINED = {"true": True, "yes": True, "false": False, "no": False}


def not_trained(fields: Mapping[str, Any]) -> str:
    """Return the field that makes the answer of a turn or row context only, such as "weight: 0"; empty if none does.

    The fields are OpenAI's `weight`, or `train`, `trainable` or `loss` of other trainers: false or 0, in CSV as text.

    Raises:
        ValueError: such a field is neither a boolean nor a number.
    """
    for name in NOT_TRAINED:
        value = fields.get(name)
        if value is None:
            continue
        trained = _TRAINED.get(str(value).strip().casefold())
        if trained is None:
            try:
                trained = float(value) > 0
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name}: found {shown(value)}, expected true or 1 (trained on), false or 0 (context only)"
                ) from None
        if not trained:
            return f"{name}: {value}"
    return ""


def explain(error: ValidationError) -> str:
    """What is wrong with a record, in a line: which field, what was found, what was expected."""
    return "; ".join(explained(error))


def explained(error: ValidationError, names: Collection[str] = ()) -> list[str]:
    """What is wrong, a line for each field.

    Args:
        names: that a misspelt name may have meant.
    """
    return [_explained(one, names) for one in error.errors(include_url=False)]


_RENAMED = {"task": "loop", "arm": "variant", "origin": "provenance", "feeds": "sources"}
"""Names of earlier versions, so that a log or a YAML of that time says what to change."""


def _explained(one: Mapping[str, Any], names: Collection[str]) -> str:
    where = ".".join(str(part) for part in one["loc"])
    message = str(one["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    if one["type"] == "missing":
        return f"{where}: is missing"
    if one["type"] == "extra_forbidden":
        given = str(one["loc"][-1])
        if given in _RENAMED:
            return f"{where}: there is no such field; it is named {_RENAMED[given]} now"
        meant = get_close_matches(given, set(names) - {given}, n=1)  # itself it is where it stands elsewhere
        return f"{where}: there is no such field" + (f"; is it {meant[0]}?" if meant else "")
    if one["type"] == "tuple_type":
        return f"{where}: found {shown(one['input'])}, expected a list: [{one['input']}]"
    if one["type"] == "union_tag_not_found":
        return f"{where}: {one['ctx']['discriminator']} is missing; say what it is"
    if one["type"] == "union_tag_invalid":
        given, known = one["ctx"]["tag"], one["ctx"]["expected_tags"]
        meant = get_close_matches(given, re.findall(r"\w+", known), n=1)
        found = f"{where}: there is no {one['ctx']['discriminator']} {given!r}"
        return f"{found}; is it {meant[0]}?" if meant else f"{found}; there are {known}"
    return f"{where}: found {shown(one['input'])}, {message.replace('Input should be', 'expected')}"


def shown(value: object, limit: int = 80) -> str:
    """A value as an error says it, of at most `limit` characters.

    It is cut between two words: of half an address or key nobody could tell what it is, and redact it.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: text.rfind(' ', 0, limit) + 1]}..."


class FileRecord(Record):
    """One file of an artifact."""

    sha256: str
    size: int = Field(ge=0, description="Bytes.")


class Manifest(Record):
    """What every artifact says of itself. Written last: its presence means that the artifact is complete."""

    stage: ClassVar[str]
    blocking_checks: ClassVar[tuple[str, ...]] = ()
    """Checks that must have passing outcomes before anything made from it is promoted."""
    loop: str
    version: str = Field(description="Hash of inputs and settings: the same version has the same content.")
    created_at: Moment
    inputs: dict[str, str] = Field(description="What it was made from: name -> hash or version.")
    settings: dict[str, Any] = Field(description="The settings that shaped it.")
    packages: dict[str, str] = Field(description="Versions of the libraries that made it.")
    files: dict[str, FileRecord]


class RawLogsManifest(Manifest):
    """A snapshot of the loop's records."""

    stage: ClassVar[str] = "raw_logs"
    interactions: int
    feedback: int
    examples: int = Field(description="Interactions with something to teach.")
    shards: list[str] = Field(
        description="Parquet files, oldest first; a later shard's row of an interaction replaces an earlier one."
    )
    new: int = Field(description="Rows of the newest shard: interactions that came or changed since the one before.")
    watermark: int = Field(description="Highest ingest offset in the snapshot.")


class DatasetManifest(Manifest):
    """A training set and its validation set."""

    stage: ClassVar[str] = "curated_dataset"
    blocking_checks: ClassVar[tuple[str, ...]] = ("enough_examples", "no_benchmark_overlap", "targets_parse")
    train: int
    validation: int
    replayed: int = Field(description="Of train: examples mixed in against forgetting.")
    sources: dict[str, int] = Field(
        default={}, description="Source -> examples of train and validation, the replayed ones among them."
    )
    left_out: dict[str, int] = Field(description="Reason -> examples.")
    redacted: dict[str, int] = Field(description="Kind of secret or personal data -> places of the training set.")
    near_benchmark: list[str] = Field(description="Interaction ids taken out as near-duplicates of the benchmark.")
    conflicts: list[tuple[str, str]] = Field(
        default=[], description="Interaction ids of an answer that was kept and of another to its question, the first."
    )
    # What is beside the training set, without its validation split. An older dataset has none of it.
    pairs: int = Field(default=0, description="Corrected answers with what the model had said instead.")
    desirable: int = Field(default=0, description="Answers found good, without the replayed ones.")
    undesirable: int = Field(default=0, description="Answers found bad.")
    watermark: int


class AdapterManifest(Manifest):
    """A trained LoRA adapter."""

    stage: ClassVar[str] = "lora_adapter"
    base_model: str = Field(description="Folder of the base model.")
    base_hash: str
    mode: Literal["full", "incremental"]
    mode_reason: str = Field(default="", description="Why, or on top of which version.")
    new_examples: int = Field(default=0, description="incremental: examples that the champion was not trained on.")
    method: Literal["sft", "dpo", "kto"] = Field(default="sft", description="What the adapter was trained by.")
    method_reason: str = Field(default="", description="Why by this method: it was set, or what was found.")
    device: str
    steps: int
    best_step: int | None = Field(default=None, description="The step whose weights were kept.")
    examples: int
    too_long: int = Field(description="Examples left out because they have more tokens than max_length.")
    rejected: int = Field(default=0, description="Examples left out because the chat template rejects them.")
    loss_before: float = Field(description="Mean loss on the validation set before training (train set if empty).")
    loss_after: float
    train_loss: float = Field(description="Mean training loss of the last logged steps.")
    tokens_per_second: float = Field(description="Tokens of text that training went through, by its wall time.")
    wall_seconds: float
    peak_memory_bytes: int
    datasets: dict[str, str] = Field(
        default={},
        description="Datasets that it and its initial adapters were trained on: version -> SHA-256 of the manifest.",
    )
    watermark: int


class GgufManifest(Manifest):
    """A model as it would serve: one file, or an adapter over the base's GGUF, whose version is in `inputs`."""

    stage: ClassVar[str] = "gguf_model"
    blocking_checks: ClassVar[tuple[str, ...]] = ("loads_and_answers", "tokenizer_parity")
    form: Literal["merged", "adapter"] = "merged"
    gguf: str = Field(description="Name of the GGUF file in the artifact's folder: the whole model, or the adapter.")
    base_gguf_sha256: str | None = Field(default=None, description="Of the base's GGUF that an adapter goes over.")
    quantization: str
    base_model: str
    base_hash: str
    adapter_version: str
    mode: Literal["full", "incremental"]
    datasets: dict[str, str] = Field(default={}, description="As the adapter's.")
    watermark: int


class BaseGgufManifest(Manifest):
    """The base model as a GGUF of the loop's quantisation: what serves and is compared with before a champion is."""

    stage: ClassVar[str] = "base_gguf"
    gguf: str = Field(description="Name of the GGUF file in the artifact's folder.")
    quantization: str
    base_hash: str


class ReportManifest(Manifest):
    """The comparison of a challenger with the champion."""

    stage: ClassVar[str] = "eval_report"
    blocking_checks: ClassVar[tuple[str, ...]] = ("gain",)
    comparison_id: str
    challenger_sha256: str = Field(description="Identity of what answered: of the file, or of base and adapter.")
    champion_id: str | None = Field(description="Registry id of the model it was compared with; None is the base.")
    champion_sha256: str = Field(description="As challenger_sha256.")
    benchmark_sha256: str
    promote: bool
    reason: str
    watermark: int


class PromotionManifest(Manifest):
    """Which model became champion."""

    stage: ClassVar[str] = "promoted_model"
    model_id: str
    model: str = Field(description="loop@version")
    gguf_path: str
    previous_id: str | None
