"""The settings of a loop and the location of its state, as pydantic models without Dagster or heavy imports.

One loop is one `finetune_pipeline/defs/<loop>/defs.yaml`. Dagster, the command line and the gateway read it through
this module. Unknown keys are errors.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from zoneinfo import available_timezones

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from finetune_pipeline.records import Rating, RatingKey
from finetune_pipeline.trainer_fields import check_lora_config, check_losses, check_member, check_trainer_config
from finetune_pipeline.validation_messages import error_messages, nearest, sentence_error
from finetune_pipeline.yaml_files import YamlError, line_of, load_yaml

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEFS_FOLDER = Path(__file__).resolve().parent / "defs"
COMPONENT_TYPE = "finetune_pipeline.orchestration.FineTuneLoop"

_ENV = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_NAME = r"^[a-z][a-z0-9_]*$"
_OWNER = r"^(team:[A-Za-z0-9_.-]+|[^@\s:]+@[^@\s:]+\.[^@\s:]+)$"
_ALIAS = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$"


class SettingsError(ValueError):
    """A loop's YAML, or an environment variable that it names, is invalid; the message says what to change."""


class InvalidSettings(SettingsError):
    """Settings in a loop's YAML are invalid.

    Attributes:
        problems: what is wrong with each, with its line.
        valid: the loop with the defaults of these settings, so that the others can be checked; None if there is none.
    """

    def __init__(self, path: Path, problems: list[str], valid: "LoopSettings | None") -> None:
        super().__init__("\n".join([f"{path}: invalid settings:", *(f"  {problem}" for problem in problems)]))
        self.problems = problems
        self.valid = valid


def home() -> Path:
    """Return the folder that everything is written to: `FINETUNE_HOME`, by default `data/state`."""
    return Path(os.environ.get("FINETUNE_HOME") or PROJECT_ROOT / "data" / "state").expanduser().resolve()


def database_url() -> str:
    """Return the database URL in SQLAlchemy's form: `FINETUNE_DATABASE_URL`, by default SQLite under `home()`."""
    return os.environ.get("FINETUNE_DATABASE_URL") or f"sqlite:///{home() / 'finetune.db'}"


def survives_power_cut() -> bool:
    """Return whether recorded events must survive a power cut, not only a kill: `FINETUNE_DURABILITY=power-cut`.

    Raises:
        SettingsError: the variable is neither "kill" (the default) nor "power-cut".
    """
    value = os.environ.get("FINETUNE_DURABILITY") or "kill"
    if value not in {"kill", "power-cut"}:
        raise SettingsError(f"FINETUNE_DURABILITY is {value!r}; expected kill (the default) or power-cut")
    return value == "power-cut"


def project_path(text: str) -> Path:
    """Return the absolute form of a path in the settings; relative paths start at the project root."""
    return (PROJECT_ROOT / Path(text).expanduser()).resolve()


def loops_dir() -> Path | None:
    """Return the user's folder of loops, `FINETUNE_LOOPS_DIR`; None if it is not set.

    Raises:
        SettingsError: it is not a folder.
    """
    given = os.environ.get("FINETUNE_LOOPS_DIR")
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise SettingsError(f"FINETUNE_LOOPS_DIR is {folder}, which is not a folder; create it, or unset the variable")
    return folder


def _from_loop_folder(text: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    return text if folder is None else str((folder / Path(text).expanduser()).resolve())


def _model_from_loop_folder(text: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    is_path = folder is not None and (text.startswith((".", "/", "~")) or (folder / text).exists())
    return _from_loop_folder(text, info) if is_path else text  # else a Hugging Face id


LoopPath = Annotated[str, AfterValidator(_from_loop_folder)]
"""A path; absolute, or relative to the project, or in `FINETUNE_LOOPS_DIR` to the loop's own folder."""


class Settings(BaseModel):
    """Base class of all settings: frozen; unknown keys, NaN and infinity are errors.

    A default has the type that reading gives, so 7.0 for a float: hashes of equal settings have to be equal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Reward = Annotated[float, Field(ge=-1, le=1)]


def _cron(value: str) -> str:
    if not re.fullmatch(r"@[a-z]+|[\w*/,?#-]+(\s+[\w*/,?#-]+){4}", value.strip()):
        raise ValueError('expected a cron schedule of five fields, such as "0 2 * * *" (2 a.m. every day)')
    return value


def _known_timezone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError("expected a name of the IANA time zone database, such as UTC or Europe/Berlin")
    return value


CronTime = Annotated[str, AfterValidator(_cron)]


class QuotaSettings(Settings):
    """The quota of a source in a dataset."""

    max_examples: int | None = Field(
        default=None, ge=1, description="Largest number of a dataset's examples from this source."
    )
    max_fraction: float = Field(
        default=1.0, gt=0, le=1,
        description="Largest fraction of a dataset from this source, relative to sources with a larger fraction.",
    )  # fmt: skip


class SourceSettings(QuotaSettings):
    """Settings of every declared source."""

    name: str = Field(pattern=_NAME, max_length=60, description="Name of the source, stored with every record.")
    reward: float = Field(default=0.8, ge=-1, le=1, description="Reward of answers whose row has none.")


class ChunkedSettings(SourceSettings):
    """Settings of every source that is read from its beginning in each sync."""

    max_chunks: int | None = Field(
        default=None, ge=1, description="Largest number of records; what follows in the source is not read."
    )


FileFormat = Literal["auto", "alpaca", "prompt_completion", "sharegpt", "messages"]
"""Format of the rows of a file; auto detects it from the fields of each row."""


class FilesSource(ChunkedSettings):
    """JSONL, JSON, CSV or Parquet files of conversations."""

    kind: Literal["files"]
    path: LoopPath = Field(description="A file or folder.")
    format: FileFormat = Field(default="auto", description="Format of the rows; auto detects it from the fields.")
    max_line_bytes: int = Field(default=1_000_000, ge=1_000, description="Longer rows are skipped.")


class TeacherSettings(Settings):
    """A model behind an OpenAI-compatible endpoint that writes prompts or artifacts."""

    url: str = Field(pattern="^https?://", description="Base URL, which usually ends in /v1.")
    model: str = Field(min_length=1, description="Name of the model at the endpoint.")
    api_key_env: str | None = Field(default=None, description="Environment variable with the API key.")
    max_tokens: int = Field(default=200_000, ge=1, description="Budget of one sync, in prompt and completion tokens.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Timeout of a request.")
    attempts: int = Field(default=4, ge=1, description="Attempts per request.")
    parallel: int = Field(default=4, ge=1, le=64, description="Number of concurrent requests.")


_Text = Annotated[
    str,
    BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
]
"""A text that YAML reads as a number or boolean if it has no quotes."""

_PLACEHOLDERS = frozenset({"topic", "day", "kind"})


def _prompt_template(text: str) -> str:
    without_parts = re.sub(r"\[[^\[\]]*\]", "", text)
    if "[" in without_parts or "]" in without_parts:
        raise sentence_error(f"{text!r} has a bracket without its other half, or brackets within brackets")
    names = re.findall(r"\{(.*?)\}", text)
    if unknown := sorted(set(names) - _PLACEHOLDERS):
        raise sentence_error(f"{text!r} has {{{unknown[0]}}}; expected {{topic}}, {{day}} or {{kind}}")
    if "topic" not in names:
        raise sentence_error(f"{text!r} has no {{topic}}, so every note would get the same prompt; add it")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise sentence_error(f"{text!r} is not a regular expression: {error}") from None
    return text


class VaultSource(ChunkedSettings):
    """An Obsidian vault: a folder of Markdown notes."""

    kind: Literal["vault"]
    path: LoopPath = Field(description="The vault's folder.")
    tags: dict[str, str] = Field(
        default={"decision": "decision", "learning": "learning", "reflection": "reflection"},
        description="Tag -> kind of the notes and sections with that tag; of several tags, the first one here counts.",
    )
    private_tags: tuple[str, ...] = Field(
        default=("private",), description="Tags of notes and sections that are never read."
    )
    headings: dict[str, str] = Field(
        default={
            "Decision": "decision",
            "Decisions": "decision",
            "Learning": "learning",
            "Learnings": "learning",
            "Reflection": "reflection",
            "Reflections": "reflection",
        },
        description="Name of a heading -> kind. Selects the sections under such a heading, also in daily notes.",
    )
    properties: dict[str, dict[_Text, str]] = Field(
        default={},
        description="Property of the frontmatter -> value -> kind of the notes with that value, such as `status: "
        "{decided: decision}`. The value `*` stands for any.",
    )
    patterns: dict[Annotated[str, AfterValidator(_pattern)], str] = Field(
        default={},
        description="Regular expression -> kind of the sections whose text it matches, if no tag, property or heading "
        "selects them; case does not matter. `in hindsight|looking back: reflection` finds such sections.",
    )
    teacher: TeacherSettings | None = Field(
        default=None,
        description="Names the kind of the sections that nothing else selects. It gets their redacted text.",
    )
    prompts: dict[str, Annotated[str, AfterValidator(_prompt_template)]] = Field(
        default={},
        description="Kind -> prompt, such as `What did I decide[ about {topic}][ on {day}]?`. A part in brackets is "
        "left out if its placeholder is empty: daily notes have no topic, and other notes no day.",
    )
    max_answer_chars: int = Field(
        default=8_000,
        ge=100,
        description="Longer answers are split into several records: at headings, else paragraphs, lines or sentences.",
    )
    whole_daily_notes: bool = Field(
        default=False, description="Select complete daily notes as reflections, even without a tag or heading."
    )
    ignore: tuple[str, ...] = Field(
        default=("templates", "_templates"),
        description="Folders to leave out, by name or by path in the vault; case does not matter.",
    )
    max_note_bytes: int = Field(default=1_000_000, ge=1_000, description="Longer notes are skipped.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that the settings name, each once."""
        of_properties = [kind for values in self.properties.values() for kind in values.values()]
        named = [*self.tags.values(), *self.headings.values(), *of_properties, *self.patterns.values()]
        return tuple(dict.fromkeys([*named, *(["reflection"] if self.whole_daily_notes else [])]))

    @model_validator(mode="after")
    def _prompts_are_of_known_kinds(self) -> "VaultSource":
        if unknown := [kind for kind in self.prompts if kind not in self.kinds]:
            raise ValueError(
                f"prompts names the kind {unknown[0]}, but no tag, heading, property or pattern has it; the kinds are "
                f"{', '.join(self.kinds)}"
            )
        return self


class CodeSource(ChunkedSettings):
    """A repository of source code. The prompts ask for its classes and functions."""

    kind: Literal["code"]
    path: LoopPath = Field(description="The repository's folder.")
    languages: tuple[Literal["python", "javascript", "typescript", "go", "rust", "java", "c", "cpp"], ...] = Field(
        default=("python",), min_length=1, description="All but python need the extra `code`."
    )
    ignore: tuple[str, ...] = Field(
        default=("node_modules", "vendor", "dist", "build", "__pycache__"), description="Names of folders to leave out."
    )
    min_lines: int = Field(default=3, ge=1, description="Minimum length of a class or function.")
    max_lines: int = Field(default=120, ge=1, description="Maximum length of a class or function.")
    teacher: TeacherSettings | None = Field(
        default=None, description="Writes the prompts; without one, they are made from signatures and docstrings."
    )
    refactorings: bool = Field(default=False, description="The teacher also writes refactoring prompts.")


class DocumentsSource(ChunkedSettings):
    """Meeting notes and requirements, with templates of the artifacts to make from them."""

    kind: Literal["documents"]
    path: LoopPath = Field(description="Folder of .md and .txt documents.")
    templates: LoopPath = Field(description="Folder of templates, one for each kind of artifact.")
    teacher: TeacherSettings | None = Field(
        default=None, description="Writes the artifacts; without one, the templates are filled."
    )


class SqlSource(SourceSettings):
    """Rated answers in a database that SQLAlchemy supports."""

    kind: Literal["sql"]
    url_env: str = Field(description="Environment variable with the database URL in SQLAlchemy's form.")
    table: str = Field(description="Table or view, optionally as schema.table.")
    key: str = Field(description="Column that identifies a row permanently.")
    cursor: str = Field(description="Column that increases whenever a row is added or changed: a number or a time.")
    prompt: str = Field(description="Column of the prompt.")
    response: str = Field(description="Column of the answer.")
    rating: str | None = Field(default=None, description="Column of the rating.")
    ratings: dict[_Text, Reward] = Field(default={}, description="Rating -> reward.")
    gold_star: str | None = Field(default=None, description="Column of a flag. If it is set, the rating is ignored.")
    gold_reward: Reward = Field(default=1.0, description="Reward of answers with a gold star.")
    author: str | None = Field(default=None, description="Column of the prompt's author.")
    domain: str | None = Field(default=None, description="Column of the domain.")
    kind_column: str | None = Field(default=None, description="Column of the kind of request.")
    only: dict[str, tuple[str, ...]] = Field(
        default={}, description="Column -> allowed values. Other rows are not read."
    )
    overlap: float = Field(
        default=60.0,
        ge=0,
        description="How far before the end of the last sync the next one starts, for rows that were committed "
        "late: in seconds if the cursor is a time, else in its own unit.",
    )
    batch_rows: int = Field(default=1_000, ge=1, le=50_000, description="Rows in memory at once.")

    @model_validator(mode="after")
    def _ratings_have_their_rewards(self) -> "SqlSource":
        if (self.rating is None) != (not self.ratings):
            raise ValueError("rating and ratings need each other: the column, and the reward of each of its values")
        return self


LOGS = "logs"
"""Name of the source of the application's own logs."""

REPLAY = "replay"
"""The source of replay examples, which a dataset adds against catastrophic forgetting."""

INGESTED = "ingested"
"""Name of the source of conversations from the drop folder and from `finetune ingest FILE`."""


class LogsSource(QuotaSettings):
    """The application's own logs. They are always read; this entry only sets their quota."""

    kind: Literal["logs"]

    @property
    def name(self) -> str:
        """Name of the source in a dataset."""
        return LOGS


class IngestedSource(QuotaSettings):
    """Conversations of dropped files and `finetune ingest`. They are always read; this entry only sets their quota."""

    kind: Literal["ingested"]

    @property
    def name(self) -> str:
        """Name of the source in a dataset."""
        return INGESTED


Source = Annotated[
    FilesSource | VaultSource | CodeSource | DocumentsSource | SqlSource | LogsSource | IngestedSource,
    Field(discriminator="kind"),
]


class IngestSettings(Settings):
    """Folders of the application's logs and of dropped files, and how they are ingested."""

    folders: tuple[LoopPath, ...] = Field(default=(), description="Folders of logs in addition to the drop folder.")
    drop_folder: LoopPath | None = Field(
        default=None, description="Folder for dropped logs and conversations; default $FINETUNE_HOME/inbox/<loop>."
    )
    default_reward: float = Field(
        default=0.8, ge=-1, le=1, description="Reward of dropped conversations whose row has none."
    )
    max_rejected_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Fraction of rejected lines above which the check rejected_lines fails."
    )
    max_line_bytes: int = Field(
        default=1_000_000,
        ge=1_000,
        description="Longer lines are rejected unread, so that they cannot fill the memory.",
    )


class ImplicitAcceptance(Settings):
    """Acceptance of answers that nobody objected to."""

    after_hours: float = Field(
        gt=0, le=87_600, description="Age in hours from which an answer without any feedback counts as accepted."
    )
    min_confidence: float = Field(
        ge=0, le=1, description="Answers with a lower confidence, or without one, do not count as accepted."
    )
    reward: float = Field(gt=0, le=1, description="Reward of their examples; it trains from `curation.min_reward` on.")


class FeedbackSettings(Settings):
    """The rewards of feedback."""

    reward_function: str | None = Field(
        default=None,
        description="Dotted path of a function (Feedback, Interaction) -> reward from -1 to 1, instead of the default "
        "rewards. It applies to events that are recorded from then on.",
    )
    ratings: dict[RatingKey, Reward] = Field(
        default={"1": -1.0, "2": -0.9, "3": 0.0, "4": 0.7, "5": 0.9, "gold": 1.0},
        description="Rewards of ratings: 1 to 5 stars, and the gold star.",
    )
    implicit_acceptance: ImplicitAcceptance | None = Field(
        default=None,
        description="Answers that nobody objected to count as accepted: after how long, from which confidence on, and "
        "with which reward. Off by default. Later feedback replaces it; changing it recomputes these examples.",
    )

    @field_validator("ratings")
    @classmethod
    def _every_rating_has_a_reward(cls, ratings: dict[Rating, float]) -> dict[Rating, float]:
        missing = [rating for rating in get_args(Rating) if rating not in ratings]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing; name the reward of every rating")
        return ratings


class RedactionSettings(Settings):
    """Kinds of secrets and personal data that are replaced by placeholders before an example can train."""

    secret: bool = Field(default=True, description="Keys, tokens, passwords, private keys and seed phrases of wallets.")
    email: bool = Field(default=True, description="E-mail addresses.")
    phone: bool = Field(default=True, description="Phone numbers.")
    phone_regions: tuple[str, ...] = Field(
        default=(),
        description="Countries, such as AT or JP, whose phone numbers are also found as they are written there. "
        "Other numbers are then more often mistaken for phone numbers.",
    )
    card: bool = Field(default=True, description="Payment card numbers.")
    iban: bool = Field(default=True, description="Bank account numbers (IBAN).")
    ssn: bool = Field(default=True, description="Social security numbers of the United States.")
    aadhaar: bool = Field(default=True, description="Aadhaar numbers of India.")
    pan: bool = Field(default=True, description="Permanent account numbers of India.")
    nir: bool = Field(default=True, description="Social security numbers of France.")
    steuer_id: bool = Field(default=True, description="Tax numbers of Germany.")
    passport: bool = Field(default=True, description="Passport numbers after their name, and machine-readable zones.")
    national_id: bool = Field(
        default=True,
        description="Identity numbers of Brazil, China, Italy, Korea, Spain, Switzerland and the United Kingdom; of "
        "other countries after their name.",
    )
    ipv4: bool = Field(default=False, description="IPv4 addresses.")
    ipv6: bool = Field(default=False, description="IPv6 addresses.")
    mac: bool = Field(default=False, description="MAC addresses.")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that are replaced."""
        return frozenset(name for name in RedactionSettings.model_fields if getattr(self, name) is True)

    @field_validator("phone_regions")
    @classmethod
    def _known(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        if regions:
            from phonenumbers import SUPPORTED_REGIONS

            if unknown := [region for region in regions if region not in SUPPORTED_REGIONS]:
                raise ValueError(f"unknown countries {unknown}; expected codes of two capital letters, such as AT")
        return regions


class CurationSettings(Settings):
    """Which examples a dataset has."""

    min_reward: float = Field(
        default=0.3, ge=-1, le=1, description="Examples with a lower reward are left out, except corrections."
    )
    min_confidence: float = Field(
        default=0.85,
        ge=0,
        le=1,
        description="Answers with a lower confidence are left out, unless a person confirmed them.",
    )
    max_prompt_chars: int = Field(
        default=8_000, ge=1, description="Longer prompts, with their conversation, are left out."
    )
    max_answer_chars: int = Field(default=16_000, ge=1, description="Longer answers are left out.")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="The same limit in tokens of the base model; by default none."
    )
    max_answer_tokens: int | None = Field(default=None, ge=1, description="The same limit for answers.")
    max_repetition: float = Field(
        default=0.3, gt=0, le=1, description="Answers that repeat a larger fraction of themselves are left out."
    )
    redaction: RedactionSettings = Field(
        default=RedactionSettings(), description="Kinds of secrets and personal data that are replaced."
    )
    near_similarity: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity of near-duplicate prompts with the same answer; null keeps near-duplicates.",
    )
    semantic: bool = Field(
        default=False, description="Remove semantic duplicates with the same answer too (extra semantic)."
    )
    semantic_similarity: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Cosine similarity of embeddings from which two prompts are semantic duplicates.",
    )
    compute: Literal["local", "ray"] = Field(
        default="local", description="Where examples are filtered: on this machine, or on a Ray cluster."
    )
    validation_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Fraction of the prompts in the validation set."
    )
    min_examples: int = Field(default=20, ge=1, description="The check enough_examples fails with fewer examples.")
    benchmark_similarity: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity to a benchmark question from which an example is left out.",
    )
    replay: LoopPath | None = Field(
        default=None,
        description="File of replay examples against catastrophic forgetting, in any format of conversations.",
    )
    replay_ratio: float = Field(
        default=1.0, ge=0, description="Replay examples for each training example; `training: auto` chooses it."
    )


class ReviewSettings(Settings):
    """Whether people have to review examples."""

    required: bool = Field(default=False, description="Only examples that a reviewer approved or edited may train.")


def _steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("expected a fraction of all steps (below 1) or a whole number of steps")
    return value


Steps = Annotated[float, AfterValidator(_steps)]
"""A number of steps, or below 1 a fraction of all steps, as in transformers' TrainingArguments."""

PresetName = Literal["cpu", "8gb", "12gb", "16gb", "24gb", "48gb", "80gb"]
"""Memory sizes for which finetune_pipeline/training/presets.py has settings."""


class TrainingSettings(Settings):
    """How an adapter is trained. Names are those of TRL, PEFT and transformers where a setting reaches them."""

    backend: Literal["auto", "peft", "unsloth", "axolotl"] = Field(
        default="auto",
        description="Training library. auto: unsloth where it is installed and supports the settings, else peft (TRL "
        "and PEFT).",
    )
    compute: Literal["local", "ray"] = Field(default="local", description="Train on this machine or a Ray cluster.")
    num_processes: int = Field(
        default=1, ge=1, description="Processes that train together: one per GPU, or one per worker of the Ray cluster."
    )
    preset: PresetName | None = Field(
        default=None,
        description="Memory size for which settings that are not set here are chosen, see `finetune train plan`.",
    )
    auto: bool = Field(
        default=False,
        description="Choose learning_rate, num_train_epochs, load_best_model_at_end and curation.replay_ratio, where "
        "they are not set, by the amount of data and the size of the base model. `training: auto` stands for this.",
    )
    method: Literal["auto", "sft", "dpo", "kto"] = Field(
        default="sft",
        description="sft: supervised fine-tuning on completions. dpo: preference pairs. kto: desirable and undesirable "
        "completions. auto: chosen by what the dataset holds.",
    )
    mode: Literal["full", "incremental"] = Field(
        default="full",
        description="full: a new adapter from the base model on all examples. incremental: warm-started from the "
        "champion's adapter, on new examples and a replay sample.",
    )
    incremental_replay_ratio: float = Field(
        default=1.0, ge=0, description="incremental: older examples of the loop to replay for each new example."
    )
    adapter: Literal["lora", "qlora"] = Field(
        default="lora", description="qlora: LoRA over base weights in 4 bits (NF4)."
    )
    lora_r: int = Field(default=16, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(default=32, ge=1, description="LoRA alpha: updates are scaled by lora_alpha / lora_r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="sft: dropout of the LoRA layers.")
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description="Modules that get LoRA layers, by the end of their names. Tied embeddings are rejected.",
    )
    use_rslora: bool = Field(default=False, description="Rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = Field(default=False, description="Weight-decomposed LoRA (DoRA): more time and memory.")
    trainable_token_indices: Literal["all"] | tuple[int, ...] = Field(
        default=(),
        description="Token ids whose embeddings are trained in addition, or all; for tokens that the base model was "
        "never trained on.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    num_train_epochs: float = Field(default=3.0, gt=0, description="Passes over the training examples.")
    per_device_train_batch_size: int = Field(
        default=8,
        ge=1,
        description="Per-device batch size with one process; several processes split it, so an update keeps its size.",
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches per update.")
    max_length: int = Field(default=1024, ge=16, description="Tokens; longer examples are left out and counted.")
    warmup_steps: Steps = Field(default=0.05, ge=0, description="Warmup steps; below 1, a fraction of all steps.")
    lr_scheduler_type: str = Field(default="cosine", description="Learning-rate schedule, by transformers' name.")
    optim: str = Field(default="adamw_torch_fused", description="Optimizer, by transformers' name.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the optimizer.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, a third to a half more time.",
    )
    bf16: bool = Field(default=True, description="Compute in bfloat16 where that is faster on this machine.")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None,
        description="Attention of transformers over padded batches; default attention within packed sequences where "
        "the architecture allows it, else transformers' choice. flash_attention_2 needs the package flash-attn.",
    )
    reward_weighted: bool = Field(
        default=False, description="sft: sample examples in proportion to 1 + reward instead of once per epoch each."
    )
    beta: float = Field(
        default=0.1, gt=0, description="dpo and kto: strength of the KL penalty to the reference model."
    )
    loss_type: tuple[str, ...] | None = Field(
        default=None,
        description="dpo: losses that are added up; default sigmoid and sft. kto: one loss; default kto.",
    )
    loss_weights: tuple[float, ...] | None = Field(
        default=None, description="dpo: a weight for each loss_type; default 1 for each."
    )
    logging_steps: Steps = Field(
        default=0.02, gt=0, description="Steps between points of the loss curve; below 1, a fraction of all steps."
    )
    save_steps: Steps = Field(
        default=0.2, gt=0, description="Steps between checkpoints and validations; below 1, a fraction of all steps."
    )
    load_best_model_at_end: bool = Field(
        default=True,
        description="Keep the weights with the lowest validation loss; false keeps the last ones.",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Validations without a lower loss after which training stops."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(), description="Trackers that transformers' Trainer reports to; each has to be installed."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the adapter's initial weights and the order of examples."
    )

    trainer_config: dict[str, Any] = Field(
        default={}, description="Other fields of TRL's SFTConfig, DPOConfig or KTOConfig, whichever the method uses."
    )
    lora_config: dict[str, Any] = Field(default={}, description="Other fields of PEFT's LoraConfig.")

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        if value == "reduce_lr_on_plateau":
            raise ValueError("but the learning rate cannot depend on the validation loss here; use cosine or linear")
        return value if value == "cosine" else check_member(value, "SchedulerType")

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return value if value == "adamw_torch_fused" else check_member(value, "OptimizerNames")

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_loss_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # as TRL's KTOConfig has it

    @field_validator("loss_type")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if value is not None and "method" in info.data:
            check_losses(value, info.data["method"])
        return value

    @field_validator("trainer_config")
    @classmethod
    def _known_trainer_fields(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and "method" in info.data:
            check_trainer_config(value, info.data["method"])
        return value

    @field_validator("lora_config")
    @classmethod
    def _known_lora_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_lora_config(value)
        return value

    @model_validator(mode="after")
    def _one_half_precision(self) -> "TrainingSettings":
        if self.bf16 and self.trainer_config.get("fp16"):
            raise ValueError("trainer_config.fp16 and bf16 exclude each other; set bf16: false")
        return self

    @model_validator(mode="after")
    def _each_loss_has_a_weight(self) -> "TrainingSettings":
        if self.loss_weights is not None and self.method != "dpo":
            raise ValueError(
                f"loss_weights weighs the losses of method dpo, and method is {self.method}; leave it out, or set "
                "method: dpo"
            )
        if self.loss_weights is not None and len(self.losses) != len(self.loss_weights):
            raise ValueError(
                f"loss_type has {len(self.losses)} entries and loss_weights has {len(self.loss_weights)}; give each "
                "loss a weight"
            )
        return self

    @property
    def losses(self) -> tuple[str, ...]:
        """Return TRL's names of the losses of dpo or kto; empty for sft, which has one."""
        default = {"dpo": ("sigmoid", "sft"), "kto": ("kto",)}
        return self.loss_type or default.get(self.method, ())


def _auto_alone(value: Any) -> Any:
    return {"auto": True} if value == "auto" else value


Training = Annotated[
    TrainingSettings,
    BeforeValidator(_auto_alone, json_schema_input_type=TrainingSettings | Literal["auto"]),
]
"""The training settings, or the word auto alone."""


class ExportSettings(Settings):
    """How a trained model is exported as a GGUF."""

    quantization: Literal["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"] = Field(
        default="Q4_K_M", description="Quantization type of llama.cpp for the model that serves."
    )
    form: Literal["merged", "adapter"] = Field(
        default="merged",
        description="merged: one file. adapter: a LoRA GGUF for the base's GGUF, hot-swapped by the gateway.",
    )
    agreement_sample: int = Field(
        default=128, ge=1, description="Number of prompts to compare the exported model with the trained one."
    )
    min_agreement: float = Field(
        default=0.8, ge=0, le=1, description="Fraction of equal answers below which the check warns."
    )
    equivalence_margin: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Largest difference of the scores (0 to 1) of exported and trained model that does not matter; the "
        "check tests equivalence within it.",
    )


class UpstreamSettings(Settings):
    """A model behind another OpenAI-compatible server: vLLM, llama-server, Ollama, or a cloud service."""

    url: str = Field(pattern="^https?://", description="Base URL of the server, usually ending in /v1.")
    model: str = Field(min_length=1, description="Name of the model at the server.")
    api_key_env: str | None = Field(default=None, description="Environment variable with the API key.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Longest wait for the next part of a response.")
    extra_body: dict[str, Any] = Field(default={}, description="Further fields of each request, by the server's names.")


class ServingSettings(Settings):
    """The gateway's settings for this loop."""

    aliases: tuple[Annotated[str, Field(pattern=_ALIAS)], ...] = Field(
        default=(), description="Further names by which requests can use this loop's champion."
    )
    upstream: UpstreamSettings | None = Field(
        default=None, description="Server that answers instead of a local llama.cpp engine."
    )
    target: str | None = Field(
        default=None,
        description="Name of the deployment target that answers instead, always with the release that is active there.",
    )
    fallback: Literal["base"] | UpstreamSettings | None = Field(
        default="base", description="What answers if the champion cannot: the base model, another server, or null."
    )
    constrain: Literal["schema", "none"] | None = Field(
        default=None,
        description="schema: decoding allows only JSON of the output_schema, in the gateway, `finetune ask` and the "
        "evaluation. none: any text. Default: schema if the loop has an output_schema.",
    )
    parallel: int = Field(default=8, ge=1, le=64, description="Requests decoded together.")
    queue: int = Field(
        default=256, ge=0, description="Further requests that may wait; more get status 503 with Retry-After."
    )
    versions: int = Field(
        default=2,
        ge=0,
        le=16,
        description="Versions that stay loaded in addition to the champion, for requests that name them; 0: none.",
    )
    unknown_fields: Literal["ignore", "reject"] = Field(
        default="ignore",
        description="Unknown fields of requests for answers: ignore and name them in X-Ignored-Fields, or reject.",
    )
    empty_limit: float = Field(
        default=0.5, ge=0, le=1, description="Fraction of empty answers above which /healthz is degraded; 1: never."
    )
    stuck_seconds: float = Field(
        default=120.0, ge=1, description="An engine without progress for this long is killed and restarted."
    )
    context: int | None = Field(
        default=None, ge=64, description="Tokens of prompt and completion; default: evaluation.context."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Default for max_tokens of a request; default: evaluation.max_tokens."
    )
    review_below: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Answers with a lower confidence are flagged for review; default: curation.min_confidence.",
    )

    @model_validator(mode="after")
    def _one_server_answers(self) -> "ServingSettings":
        if self.upstream is not None and self.target is not None:
            raise sentence_error("upstream and target both name the server that answers; set one of them")
        return self


class TargetSettings(Settings):
    """Settings of every deployment target."""

    kind: str
    name: str | None = Field(
        default=None, pattern=_NAME, max_length=60, description="Name in `finetune deploy status`; default: the kind."
    )

    @property
    def key(self) -> str:
        """Name of the target, unique in a loop."""
        return self.name or self.kind


class ServerTarget(TargetSettings):
    """Settings of every target that is a server."""

    url: str = Field(pattern="^https?://", description="Base URL of the server, without /v1.")
    api_key_env: str | None = Field(default=None, description="Environment variable with the API key.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Longest wait for one response of the server.")
    keep: int = Field(default=2, ge=1, description="Releases that stay on the server, the active one among them.")


class OllamaTarget(ServerTarget):
    """An Ollama server; it gets the merged GGUF."""

    kind: Literal["ollama"] = "ollama"
    model: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9._/-]{0,79}$",
        description="Model name that applications ask for; default: the loop's name. Releases are its tags.",
    )


class VllmTarget(ServerTarget):
    """A vLLM server. It loads each release as a LoRA adapter, or is started with a merged folder."""

    kind: Literal["vllm"] = "vllm"
    form: Literal["adapter", "merged"] = Field(
        default="adapter",
        description="adapter: loaded at run time under a new name. merged: a folder and the command to start with it.",
    )
    folder: LoopPath | None = Field(
        default=None,
        description="Folder for the server's files, which it reads at the same path; default: under FINETUNE_HOME.",
    )


class LlamaServerTarget(ServerTarget):
    """A llama-server of llama.cpp."""

    kind: Literal["llama_server"] = "llama_server"
    form: Literal["router", "adapter"] = Field(
        default="router",
        description="router: a new file in the server's models folder for each release. adapter: LoRA adapters that "
        "the server was started with, switched by their scales.",
    )
    folder: LoopPath = Field(description="The server's models folder (router), or the one of its adapters.")


class FolderTarget(TargetSettings):
    """A folder in the layout of the Hugging Face Hub: adapter, GGUF, tokenizer and model card of each release."""

    kind: Literal["folder"] = "folder"
    path: LoopPath = Field(description="The folder; each release is a folder in it, and `current` links to the active.")
    merged: bool = Field(default=False, description="Write the merged weights as safetensors too.")
    keep: int = Field(default=5, ge=1, description="Releases that stay, the active one among them.")


_Target = OllamaTarget | VllmTarget | LlamaServerTarget | FolderTarget
DeployTarget = Annotated[_Target, Field(discriminator="kind")]
"""A deployment target."""


def _tag_pattern(text: str) -> str:
    names = re.findall(r"\{(.*?)\}", text)
    if unknown := sorted(set(names) - {"date", "version", "loop"}):
        raise sentence_error(f"{text!r} has {{{unknown[0]}}}; expected {{date}}, {{version}} or {{loop}}")
    if "version" not in names:
        raise sentence_error(f"{text!r} has no {{version}}, so every version would get the same tag; add it")
    return text


class ModelfilesSettings(Settings):
    """A git repository with one Modelfile, one commit and one tag for each version."""

    path: LoopPath = Field(description="Folder of the repository; it is created if it does not exist.")
    tag: Annotated[str, AfterValidator(_tag_pattern)] = Field(
        default="finetuned-v{date}-v{version}",
        description="Pattern of the tags: {date} is the day of the first promotion (UTC), {version} such as 1.2.0, "
        "{loop} the loop's name.",
    )
    weights: bool = Field(default=False, description="Commit the GGUF too, with Git LFS, which has to be installed.")

    kind: ClassVar[str] = "modelfiles"
    key: ClassVar[str] = "modelfiles"
    keep: ClassVar[int] = 1

    def tag_of(self, loop: str, version: str, promoted: date) -> str:
        """Return the tag of a version such as v1.2.0."""
        values = {"{date}": f"{promoted:%Y-%m-%d}", "{version}": version.removeprefix("v"), "{loop}": loop}
        return re.sub(r"\{\w+\}", lambda match: values[match[0]], self.tag)

    def version_of(self, loop: str, tag: str) -> str | None:
        """Return the version that a tag names, such as v1.2.0; None if it is no tag of this pattern and loop."""
        values = {r"\{date\}": r"\d{4}-\d\d-\d\d", r"\{version\}": r"(\d+\.\d+\.\d+)", r"\{loop\}": re.escape(loop)}
        pattern = re.sub(r"\\\{\w+\\\}", lambda match: values[match[0]], re.escape(self.tag))
        found = re.fullmatch(pattern, tag)
        return f"v{found[1]}" if found else None


Follower = _Target | ModelfilesSettings
"""What follows the champion: a deployment target, or the repository of Modelfiles."""


class DeploySettings(Settings):
    """Where a promoted model is deployed to, in addition to this project's gateway."""

    targets: tuple[DeployTarget, ...] = Field(default=(), description="Servers and folders that follow the champion.")
    config: dict[str, Any] = Field(
        default={},
        description="deployment_config: settings of the servers by their own names, such as temperature or "
        "max_model_len. Targets reject what they cannot apply.",
    )
    modelfiles: ModelfilesSettings | None = Field(default=None, description="Keep a Modelfile of each version in git.")
    parity_sample: int = Field(
        default=50, ge=1, description="Benchmark questions that a staged release answers before it becomes active."
    )
    retry_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Wait before the second try of a target; doubled for each further one, to an hour.",
    )

    @property
    def followers(self) -> tuple[Follower, ...]:
        """Return all that follows the champion: the targets, and the repository of Modelfiles."""
        return (*self.targets, *([self.modelfiles] if self.modelfiles else []))

    @field_validator("targets")
    @classmethod
    def _target_names_are_unique(cls, targets: tuple[DeployTarget, ...]) -> tuple[DeployTarget, ...]:
        names = [target.key for target in targets]
        duplicates = sorted({name for name in names if names.count(name) > 1 or name == ModelfilesSettings.key})
        if duplicates:
            raise ValueError(f"{', '.join(duplicates)} is taken; give each target its own name")
        return targets


class RegistrySettings(Settings):
    """What garbage collection keeps."""

    keep: int = Field(default=5, ge=1, description="Models of this many newest deployments are never deleted.")


class MetricSettings(Settings):
    """Settings of every metric."""

    kind: str
    name: str | None = Field(
        default=None, pattern=_NAME, max_length=60, description="Name in the report; default: the kind."
    )

    @property
    def key(self) -> str:
        """Name of the metric in reports, unique in a loop."""
        return self.name or self.kind


class ParametersMetric(MetricSettings):
    """Values of the expected JSON that the answer has at the same path.

    A path is written with dots and without the indices of lists: `layers.thickness_mm` is that value of every layer. A
    setting for a path applies to everything under it, and the longest path counts.
    """

    kind: Literal["parameters"] = "parameters"
    weights: dict[str, Annotated[int, Field(ge=0, le=1_000)]] = Field(
        default={}, description="Path -> how often a value counts; default 1. Values with 0 are not compared."
    )
    relative_tolerance: float = Field(
        default=0.0, ge=0, lt=1, description="Largest relative error of a number: 0.01 accepts 101 for 100."
    )
    tolerances: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Path -> largest absolute error of a number, instead of the relative one."
    )
    unordered: tuple[str, ...] = Field(
        default=(),
        description="Paths of lists whose order does not matter; their items are paired so that most values agree.",
    )


class ExactMetric(MetricSettings):
    """Answers that are the expected one: texts in any case and with any white space, JSON with the same values."""

    kind: Literal["exact"] = "exact"


class ContainsMetric(MetricSettings):
    """Answers that contain the expected text, in any case and with any white space."""

    kind: Literal["contains"] = "contains"


class RegexMetric(MetricSettings):
    """Answers in which a regular expression finds the expected text.

    With a group, the text of the first group must be the expected answer, as `exact` compares texts. Without one, the
    pattern must match anywhere in the answer, whatever the expected answer.
    """

    kind: Literal["regex"] = "regex"
    pattern: Annotated[str, AfterValidator(_pattern)] = Field(
        min_length=1, description="Regular expression (Python), such as `Answer: (.*)`; the last match counts."
    )


class Rouge1Metric(MetricSettings):
    """ROUGE-1 recall: expected words that the answer has, within the expected length."""

    kind: Literal["rouge1"] = "rouge1"


class RougeLMetric(MetricSettings):
    """ROUGE-L F1: the longest common subsequence of words, in thousandths (extra metrics)."""

    kind: Literal["rougeL"] = "rougeL"


class ChrfMetric(MetricSettings):
    """chrF2 of sacrebleu, by character n-grams, in thousandths (extra metrics)."""

    kind: Literal["chrf"] = "chrf"


class EditSimilarityMetric(MetricSettings):
    """Normalized similarity by edit distance (Levenshtein) of the characters, in thousandths (extra metrics)."""

    kind: Literal["edit_similarity"] = "edit_similarity"


class EmbeddingSimilarityMetric(MetricSettings):
    """Cosine similarity to the expected answer's embedding of all-MiniLM-L6-v2, in thousandths (extra semantic).

    A similarity below 0 counts as 0.
    """

    kind: Literal["embedding_similarity"] = "embedding_similarity"


class StyleMetric(MetricSettings):
    """Cosine similarity to the mean embedding of texts that a person wrote, in thousandths (extra semantic)."""

    kind: Literal["style"] = "style"
    texts: LoopPath = Field(
        description="A .txt or .md file, or a folder of them, kept out of training; its paragraphs are the texts."
    )


class ParsesMetric(MetricSettings):
    """Answers whose code parses: the first fenced block, or the whole answer if it has none."""

    kind: Literal["parses"] = "parses"
    language: Literal["python", "javascript", "typescript", "go", "rust", "java", "c", "cpp"] = Field(
        default="python", description="All but python need the extra `code`."
    )


class CodeTestsMetric(MetricSettings):
    """Answers whose Python code passes the question's `tests` in a sandbox without network (Linux, bubblewrap)."""

    kind: Literal["tests"] = "tests"
    timeout_seconds: float = Field(default=5.0, gt=0, le=300, description="Longest run of an answer with its tests.")
    memory_mb: int = Field(default=512, ge=64, description="Most memory of an answer's processes together.")


class FunctionMetric(MetricSettings):
    """A Python function of your own."""

    kind: Literal["function"] = "function"
    function: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$",
        description="Dotted path of a function (BenchmarkQuestion, answer) -> score from 0 to 1, counted in "
        "thousandths.",
    )


class JudgeMetric(MetricSettings):
    """A model behind an OpenAI-compatible endpoint says which of the two answers is better, asked in both orders.

    A win counts 2 of 2 and a tie 1 of 2. Verdicts that depend on the order are set aside. Its agreement with people is
    measured on pairs of answers to one prompt that people rated or corrected, redacted.
    """

    kind: Literal["judge"] = "judge"
    url: str = Field(pattern="^https?://", description="Base URL, which usually ends in /v1.")
    model: str = Field(min_length=1, description="Name of the model at the endpoint.")
    api_key_env: str | None = Field(default=None, description="Environment variable with the API key.")
    criteria: str = Field(
        default="correct, complete and no longer than needed", min_length=1, description="What a good answer is."
    )
    max_tokens: int = Field(default=16, ge=1, description="Maximum tokens of a verdict; models that reason need more.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Timeout of a verdict.")
    attempts: int = Field(default=3, ge=1, le=10, description="Attempts per verdict, if the endpoint fails.")
    parallel: int = Field(default=4, ge=1, le=64, description="Number of concurrent requests.")
    max_pairs: int = Field(
        default=100, ge=0, description="Newest pairs of answers on which the agreement with people is measured."
    )
    min_pairs: int = Field(default=30, ge=1, description="Judged pairs that the gate requires.")
    min_agreement: float = Field(
        default=0.8, gt=0.5, le=1, description="Agreement with people that the gate requires, a fraction of the pairs."
    )


_Metric = (
    ParametersMetric
    | ExactMetric
    | ContainsMetric
    | RegexMetric
    | Rouge1Metric
    | RougeLMetric
    | ChrfMetric
    | EditSimilarityMetric
    | EmbeddingSimilarityMetric
    | StyleMetric
    | ParsesMetric
    | CodeTestsMetric
    | FunctionMetric
    | JudgeMetric
)
METRIC_KINDS: dict[str, type[MetricSettings]] = {
    model.model_fields["kind"].default: model for model in get_args(_Metric)
}
_PLAIN_KINDS = tuple(
    kind
    for kind, model in METRIC_KINDS.items()
    if not any(field.is_required() for field in model.model_fields.values())
)


def _metric_of_kind(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Mapping) and "kind" not in value:
        raise sentence_error(f"kind is missing; expected one of {', '.join(METRIC_KINDS)}")
    return value


Metric = Annotated[
    _Metric,
    Field(discriminator="kind"),
    BeforeValidator(_metric_of_kind, json_schema_input_type=_Metric | Literal[_PLAIN_KINDS]),
]
"""A metric: its settings, or its kind alone if it needs no others."""


class EvaluationSettings(Settings):
    """The benchmark, and how models answer it."""

    benchmark: LoopPath = Field(
        description="JSONL file of id, slice, prompt and expected answer; see docs/how-to/benchmark.md."
    )
    metric: Metric = Field(default=ParametersMetric(), description="The metric that the gate counts.")
    metrics: tuple[Metric, ...] = Field(default=(), description="Further metrics of the report, which never decide.")
    samples: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Sampled answers to each question, for pass^k: the fraction of questions with all of them correct. "
        "0: none; they decide nothing.",
    )
    sample_temperature: float = Field(default=0.7, gt=0, le=2, description="Temperature of the sampled answers.")
    compliance: LoopPath | None = Field(default=None, description="JSON file of compliance rules (JSON Schemas).")
    max_tokens: int = Field(default=256, ge=1, description="Maximum tokens of an answer.")
    context: int = Field(default=2048, ge=64, description="Maximum tokens of prompt and answer together.")
    parallel: int = Field(default=8, ge=1, le=64, description="Prompts decoded in parallel.")
    sealed_benchmark: LoopPath | None = Field(
        default=None,
        description="A second benchmark that is asked only at every sealed_every-th promotion. It tells whether the "
        "first one has been overfitted, and decides nothing; its answers are not shown.",
    )
    sealed_every: int = Field(default=5, ge=1, description="Promotions from one look at sealed_benchmark to the next.")
    price_per_hour: float | None = Field(
        default=None,
        gt=0,
        description="Price of an hour of this machine, in any currency; the report then shows the cost of a million "
        "generated tokens.",
    )

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """The gate's metric, then the further ones."""
        return (self.metric, *self.metrics)

    @model_validator(mode="after")
    def _samples_are_scored_one_by_one(self) -> "EvaluationSettings":
        if self.samples and self.metric.kind == "judge":
            raise sentence_error(
                "samples needs a metric that scores one answer, and metric: judge compares two; set samples: 0, or "
                "another metric for the gate"
            )
        return self

    @model_validator(mode="after")
    def _sealed_answers_are_scored_one_by_one(self) -> "EvaluationSettings":
        if self.sealed_benchmark and self.metric.kind == "judge":
            raise sentence_error(
                "sealed_benchmark needs a metric that scores one answer, and metric: judge compares two; remove it, or "
                "set another metric for the gate"
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _metric_names_are_unique(cls, metrics: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        gate = info.data.get("metric")
        keys = [one.key for one in ([gate] if gate else []) + list(metrics)]
        if duplicates := sorted({key for key in keys if keys.count(key) > 1}):
            raise sentence_error(
                f"{duplicates[0]} occurs twice in metric and metrics; remove one of them, or give it a name: "
                f"{{kind: ..., name: {duplicates[0]}_2}}"
            )
        return metrics


BUDGET_TESTS = 12
"""Comparisons among which `gate.significance_level` is divided, until a confirmed promotion renews the budget."""


class GateSettings(Settings):
    """When a challenger is promoted."""

    min_gain: float = Field(
        default=0.05, ge=0, le=1, description="Required gain: 0.05 is 5% (relative), 5 points, or 5% fewer errors."
    )
    mode: Literal["relative", "points", "error_reduction"] = Field(
        default="relative", description="How the gain is measured; error_reduction suits a champion with few errors."
    )
    min_score: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Score (0 to 1) that a challenger must exceed, whatever the champion's. Default: the score of the "
        "best constant answer, that is, of the expected answer that scores highest when given to every question.",
    )
    on_reject: Literal["fail", "keep_champion"] = Field(
        default="fail",
        description="fail: a rejection fails the run. keep_champion: the run succeeds with a failed check.",
    )
    significance: Literal["shown", "required"] = Field(
        default="shown",
        description="required: a gain must be significant within an error budget, or the verdict is inconclusive.",
    )
    significance_level: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Significance level of the one-sided paired test, and of the tests of slices and regression suite. "
        "With significance: required it is the error budget: the probability of any promotion without a gain in twelve "
        "comparisons.",
    )
    confirm_days: float = Field(
        default=7.0,
        gt=0,
        description="Days without a rollback after which a promotion is confirmed, which renews the error budget.",
    )
    slices: Literal["shown", "required"] = Field(
        default="shown",
        description="required: reject a challenger that loses more than slice_margin in a slice of the benchmark, "
        "significantly by Holm's correction over all slices.",
    )
    slice_margin: float = Field(
        default=0.05, ge=0, lt=1, description="Loss that a slice may have: 0.05 is 5% of its highest possible score."
    )
    regression: Literal["shown", "required"] = Field(
        default="shown",
        description="required: reject a challenger that breaks more than regression_tolerance of the corrections that "
        "earlier promotions fixed, significantly.",
    )
    regression_tolerance: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of fixed corrections that may be broken: 0.1 is 10%, about what a retraining without any "
        "change breaks by chance.",
    )

    @property
    def test_level(self) -> float:
        """Return the significance level of one comparison: with significance: required, its part of the budget."""
        return self.significance_level / (BUDGET_TESTS if self.significance == "required" else 1)


class TriggerSettings(Settings):
    """When a run starts by itself."""

    new_examples: int = Field(
        default=50,
        ge=1,
        description="New high-reward examples that start a run. Corrected and approved ones count at any reward.",
    )
    max_attempts: int = Field(
        default=3, ge=1, description="Runs on the same data, if they fail, before the sensor waits for more data."
    )
    retry_after_minutes: float = Field(default=5.0, ge=0, description="Minutes between a failed run and the next.")
    interval_seconds: int = Field(default=30, ge=5, description="Seconds between two evaluations of the sensor.")
    stalled_minutes: float = Field(
        default=60.0, gt=0, description="An unfinished run that logs nothing for so long no longer delays the next run."
    )
    running: bool = Field(
        default=False, description="Turn the sensor and both schedules on by default, without a click in the UI."
    )
    nightly: CronTime = Field(default="0 2 * * *", description="Cron expression of the nightly schedule.")
    yearly: CronTime = Field(default="0 3 1 1 *", description="Cron expression of the yearly full retraining.")
    timezone: Annotated[str, AfterValidator(_known_timezone)] = Field(
        default="UTC", description="Time zone of both schedules, such as Europe/Berlin."
    )


AlertKind = Literal["failure", "rejection", "promotion", "approval", "deployment"]
"""What an alert is about: a failed run, a challenger that the gate did not accept, a new champion, a challenger that
waits for an approval, a deployment target that cannot be brought to the champion."""


def _variable_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise sentence_error("expected the name of an environment variable with the URL, since the URL is a secret")
    return value


_VariableName = Annotated[str, AfterValidator(_variable_name)]


class AlertSettings(Settings):
    """What people are told about the loop, and where. Every alert is also logged; `finetune alerts` lists them."""

    kinds: tuple[AlertKind, ...] = Field(
        default=get_args(AlertKind),
        description="failure: a run failed. rejection: the gate did not accept a challenger. promotion: a new "
        "champion. approval: a challenger waits for one. deployment: a target cannot be brought to the champion.",
    )
    webhook_env: _VariableName | None = Field(
        default=None, description="Environment variable with the URL that gets each alert as JSON, by POST."
    )
    slack_env: _VariableName | None = Field(
        default=None, description="Environment variable with the URL of a Slack incoming webhook, or a compatible one."
    )
    timeout_seconds: float = Field(default=5.0, gt=0, le=60, description="Longest time that sending an alert may take.")
    freshness_days: float | None = Field(
        default=None,
        ge=0.001,
        le=3650,
        description="Days after the last promotion from which Dagster shows promoted_model as not fresh. Default: no "
        "freshness policy, since a loop without new feedback promotes nothing.",
    )


class LoopSettings(Settings):
    """One fine-tuning loop: one task with its base model, data and benchmark."""

    name: str = Field(pattern=_NAME, max_length=60, description="Name of the loop, its group, job, sensor, schedules.")
    key_prefix: str | None = Field(
        default=None, description="Prefix of the asset keys; default: the name. An empty prefix gives bare keys."
    )
    description: str = Field(default="", description="One sentence on what the loop's model does.")
    owners: tuple[Annotated[str, Field(pattern=_OWNER)], ...] = Field(
        default=(), description="Owners of the assets, shown in Dagster's UI: email addresses, or team:NAME."
    )
    base_model: Annotated[str, AfterValidator(_model_from_loop_folder)] = Field(
        description="Hugging Face model id, a local folder, or a GGUF (also Ollama's blob of one)."
    )
    system_prompt: str = Field(
        default="", description="System message of every prompt, in training, evaluation and serving."
    )
    output_schema: LoopPath | None = Field(
        default=None, description="JSON Schema file for the answers; without one, answers are free text."
    )
    sources: tuple[Source, ...] = Field(
        default=(), description="Declared sources in addition to the logs; see docs/how-to/sources.md."
    )
    ingest: IngestSettings = IngestSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    curation: CurationSettings = CurationSettings()
    review: ReviewSettings = ReviewSettings()
    training: Training = TrainingSettings()
    export: ExportSettings = ExportSettings()
    evaluation: EvaluationSettings
    gate: GateSettings = GateSettings()
    approval: Literal["none", "required"] = Field(
        default="none",
        description="required: a challenger that the gate accepts waits for `finetune model approve`; see "
        "docs/how-to/approve.md.",
    )
    approval_days: float | None = Field(
        default=None,
        gt=0,
        le=36_500,
        description="Days after which a challenger can no longer be approved; default: never.",
    )
    trigger: TriggerSettings = TriggerSettings()
    serving: ServingSettings = ServingSettings()
    deploy: DeploySettings = DeploySettings()
    registry: RegistrySettings = RegistrySettings()
    alerts: AlertSettings = AlertSettings()

    @model_validator(mode="before")
    @classmethod
    def _resolve_environment(cls, data: Any) -> Any:
        return resolve_environment(data)

    @field_validator("sources")
    @classmethod
    def _source_names_are_unique(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        reserved = sorted(
            {REPLAY, LOGS, INGESTED}
            & {source.name for source in sources if not isinstance(source, LogsSource | IngestedSource)}
        )
        if duplicates or reserved:
            raise ValueError(f"{', '.join(duplicates or reserved)} is taken; give each source its own name")
        return sources

    @model_validator(mode="after")
    def _parameters_need_a_schema(self) -> "LoopSettings":
        if self.evaluation.metric.kind == "parameters" and self.output_schema is None:
            raise sentence_error(
                "evaluation.metric: parameters needs output_schema; set it, or set evaluation.metric: rouge1"
            )
        return self

    @model_validator(mode="after")
    def _constrained_decoding_needs_a_schema(self) -> "LoopSettings":
        if self.serving.constrain == "schema" and self.output_schema is None:
            raise sentence_error(
                "serving.constrain: schema needs output_schema; set it, or set serving.constrain: none"
            )
        return self

    @model_validator(mode="after")
    def _serving_target_answers(self) -> "LoopSettings":
        name, servers = self.serving.target, [one for one in self.deploy.targets if isinstance(one, ServerTarget)]
        found = next((one for one in servers if one.key == name), None)
        if name is not None and found is None:
            known = ", ".join(one.key for one in servers) or "none"
            raise sentence_error(f"serving.target: {name} is no server of deploy.targets; there are: {known}")
        if found is not None and found.keep < 2:
            raise sentence_error(
                f"serving.target: {name} has keep: 1, so the release that the gateway asks would be removed before it "
                "follows to the next one; set keep to at least 2"
            )
        return self

    @model_validator(mode="after")
    def _adapter_gguf_can_hold_the_adapter(self) -> "LoopSettings":
        if self.export.form == "merged":
            return self
        training = self.training
        unsupported = [
            *(name for name in ("trainable_token_indices", "use_rslora", "use_dora") if getattr(training, name)),
            *(f"lora_config.{name}" for name in ("bias", "lora_bias", "alpha_pattern") if name in training.lora_config),
        ]
        if unsupported:
            raise ValueError(
                f"a GGUF adapter cannot hold what training.{', training.'.join(unsupported)} trains; set export.form: "
                "merged, or leave it out"
            )
        return self

    @property
    def prefix(self) -> list[str]:
        """Return the prefix of the asset keys as Dagster takes it: an empty list or one part."""
        prefix = self.name if self.key_prefix is None else self.key_prefix
        return [prefix] if prefix else []

    @property
    def job_name(self) -> str:
        """Name of the Dagster job that runs the whole loop."""
        return f"{self.name}_loop"

    @property
    def base_quantization(self) -> str:
        """Return the quantization of the base model's GGUF: `export.quantization`, or "as given" if it is a GGUF."""
        return "as given" if project_path(self.base_model).is_file() else self.export.quantization

    @property
    def context(self) -> int:
        """Return the context length in serving: tokens of prompt and answer together."""
        return self.serving.context or self.evaluation.context

    @property
    def max_tokens(self) -> int:
        """Return the maximum number of tokens of a served answer, unless the request sets its own."""
        return self.serving.max_tokens or self.evaluation.max_tokens

    @property
    def constrain(self) -> Literal["schema", "none"]:
        """Return whether decoding is constrained to the output schema."""
        return self.serving.constrain or ("none" if self.output_schema is None else "schema")

    @property
    def review_below(self) -> float:
        """Return the confidence below which a served answer is flagged for review."""
        below = self.serving.review_below
        return self.curation.min_confidence if below is None else below

    @property
    def drop_folder(self) -> Path:
        """Return the folder where an application drops its event files."""
        given = self.ingest.drop_folder
        return project_path(given) if given else home() / "inbox" / self.name

    @property
    def log_folders(self) -> list[Path]:
        """Return every folder that raw_logs reads: the declared ones, then the drop folder."""
        return [*(project_path(folder) for folder in self.ingest.folders), self.drop_folder]


def resolve_environment(value: Any) -> Any:
    """Return a YAML value with every `{{ env.NAME }}` replaced.

    Raises:
        SettingsError: a variable is not set.
    """
    if isinstance(value, str):
        return _ENV.sub(_environment_value, value)
    if isinstance(value, Mapping):
        return {key: resolve_environment(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_environment(item) for item in value]
    return value


def _environment_value(match: re.Match[str]) -> str:
    name = match.group(1)
    if name not in os.environ:
        raise SettingsError(f"the YAML uses {{{{ env.{name} }}}}, but {name} is not set; export it, or write the value")
    return os.environ[name]


_ROUNDS = 5
"""How often invalid settings are removed, since some are found only when others are valid."""

_DEFS_FILE = re.compile(r"defs\.ya?ml", re.IGNORECASE)

_KEYS = {"type", "attributes", "template_vars_module", "requirements", "post_processing"}
"""Top-level keys that Dagster knows in a component's YAML."""


def read_loop(path: Path) -> LoopSettings:
    """Read the settings of one `defs.yaml`.

    Raises:
        SettingsError: the file is not valid YAML, has another component type, or a setting is unknown or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = load_yaml(text)
        if not isinstance(document, dict) or document.get("type") != COMPONENT_TYPE:
            raise SettingsError(f"{path}: expected `type: {COMPONENT_TYPE}` and `attributes:`")
        if unknown := sorted(map(str, document.keys() - _KEYS)):
            raise SettingsError(
                f"{path}: unknown top-level keys: {', '.join(unknown)}; move a loop's settings under `attributes`"
            )
        folder = loops_dir()
        outside = folder is not None and path.resolve().is_relative_to(folder)
        context = {"folder": path.resolve().parent} if outside else None
        if outside and (ignored := sorted(document.keys() - {"type", "attributes"})):
            raise SettingsError(
                f"{path}: {', '.join(ignored)}: allowed only in the package's defs/, which Dagster loads; remove"
            )
        return LoopSettings.model_validate(document.get("attributes") or {}, context=context)
    except YamlError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); fix that, or remove it") from error
    except ValidationError as error:
        lines = []
        for message in error_messages(error, _names()):
            line = line_of(text, f"attributes.{message.partition(': ')[0]}")
            lines.append(f"{message} (line {line})" if line else message)
        valid = _without_invalid(document.get("attributes") or {}, context, error)
        raise InvalidSettings(path, lines, valid) from error


def _without_invalid(attributes: Any, context: Any, error: ValidationError) -> LoopSettings | None:
    """Return a loop without its invalid settings; None if it needs one of them."""
    attributes = deepcopy(attributes)
    for _ in range(_ROUNDS):
        found: dict[tuple[int, Any], Any] = {}
        for one in error.errors(include_url=False):
            node: Any = attributes
            innermost: tuple[Any, Any] | None = None
            for part in one["loc"]:  # which has the members of unions too
                inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
                if inside:
                    innermost, node = (node, part), node[part]
            if innermost:
                found[id(innermost[0]), innermost[1]] = innermost[0]
        for (_, part), container in reversed(found.items()):  # the last index of a list first
            del container[part]
        try:
            return LoopSettings.model_validate(attributes, context=context)
        except ValidationError as again:
            error = again
    return None


def loop_file(name: str) -> Path | None:
    """Return the YAML that declares a loop; None if there is none, as for settings that a program made."""
    for path in (path for folder in loop_folders() for path in sorted(folder.glob("*/defs.yaml"))):
        with suppress(YamlError, UnicodeDecodeError, OSError):
            document = load_yaml(path.read_text(encoding="utf-8"))
            if isinstance(document, dict) and (document.get("attributes") or {}).get("name") == name:
                return path
    return None


def _names() -> dict[str, list[str]]:
    """Return the names of the settings of each section, and the kinds of sources and metrics; "" is the top level."""
    names = {"": list(LoopSettings.model_fields)}
    sources, targets = TypeAdapter(Source).json_schema(), TypeAdapter(DeployTarget).json_schema()
    names["kind"] = [*sources["discriminator"]["mapping"], *METRIC_KINDS, *targets["discriminator"]["mapping"]]
    for section, field in LoopSettings.model_fields.items():
        annotation: Any = field.annotation
        schema = TypeAdapter(annotation).json_schema()
        parts = [schema, *schema.get("$defs", {}).values()]
        names[section] = [name for part in parts for name in part.get("properties", {})]
    return names


def loop_folders() -> list[Path]:
    """Return the folders whose `*/defs.yaml` declare loops: the package's `defs/`, and that of FINETUNE_LOOPS_DIR."""
    outside = loops_dir()
    return [DEFS_FOLDER, outside] if outside else [DEFS_FOLDER]


def load_loops(folders: Sequence[Path] | None = None) -> dict[str, LoopSettings]:
    """Return every declared loop by name, ordered by folder name.

    Args:
        folders: default: `loop_folders`.

    Raises:
        SettingsError: a file is invalid or would not be read, or two loops have one name.
    """
    loops: dict[str, LoopSettings] = {}
    files: dict[str, Path] = {}
    for folder in loop_folders() if folders is None else folders:
        _refuse_misplaced(folder)
        for path in sorted(folder.glob("*/defs.yaml")):
            if _is_another_component(path):
                continue
            loop = read_loop(path)
            if loop.name in loops:
                raise SettingsError(
                    f"{path}: the loop in {files[loop.name]} is already named {loop.name!r}; give each loop its own "
                    "name"
                )
            loops[loop.name], files[loop.name] = loop, path
    return loops


def _refuse_misplaced(folder: Path) -> None:
    """Raise an error for a loop's file that is not read because of its name or its place."""
    own = folder if folder == DEFS_FOLDER else f"FINETUNE_LOOPS_DIR ({folder})"
    rule = f"{own} holds loops as <loop>/defs.yaml"
    for path in sorted(folder.glob("*/*")):
        is_named_so = _DEFS_FILE.fullmatch(path.name) and path.name != "defs.yaml"
        if is_named_so and not (path.parent / "defs.yaml").exists():
            raise SettingsError(f"{rule}; found {path.relative_to(folder)}: rename it to defs.yaml")
    if folder == DEFS_FOLDER:
        return  # Dagster may have files of its own there
    for path in sorted(folder.iterdir()):
        if _DEFS_FILE.fullmatch(path.name) and path.is_file():
            raise SettingsError(f"{rule}; found {path.name}: set the variable to {folder.parent}")
    if not any(folder.glob("*/defs.yaml")):
        for path in sorted(folder.glob("*/*/defs.yaml")):
            found = path.relative_to(folder)
            raise SettingsError(f"{rule}; found {found}: set the variable to {path.parents[1]}")


def _is_another_component(path: Path) -> bool:
    """Return whether a file declares a component of another package, which Dagster loads from the package's `defs/`.

    A missing or misspelled type is not one: `read_loop` reports it.
    """
    if not path.is_relative_to(DEFS_FOLDER):
        return False
    try:
        document = load_yaml(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError, OSError):
        return False
    kind = document.get("type") if isinstance(document, dict) else None
    package = COMPONENT_TYPE.partition(".")[0]
    return isinstance(kind, str) and not kind.startswith(f"{package}.") and "." in kind


def load_loop(name: str) -> LoopSettings:
    """Return the loop of this name.

    Raises:
        SettingsError: there is no such loop; the message lists the existing ones.
    """
    loops = load_loops()
    if name not in loops:
        meant = nearest(name, loops)
        folders = " and ".join(map(str, loop_folders()))
        raise SettingsError(
            f"No loop is named {name!r}. {f'Did you mean {meant}? ' if meant else ''}"
            f"The loops in {folders} are: {', '.join(loops) or 'none'}."
            + ("" if loops_dir() else " FINETUNE_LOOPS_DIR is not set; it names the folder of your own loops.")
        )
    return loops[name]


def the_loop(name: str | None) -> LoopSettings:
    """Return the loop of this name; without a name, the default loop.

    That is the loop that FINETUNE_LOOP names, or else the only one in FINETUNE_LOOPS_DIR, or, if that variable is not
    set, the only one that is declared.

    Raises:
        SettingsError: there is no such loop, or no name was given and there is no default loop.
    """
    if name is not None:
        return load_loop(name)
    if named := os.environ.get("FINETUNE_LOOP"):
        try:
            return load_loop(named)
        except InvalidSettings:
            raise
        except SettingsError as error:
            raise SettingsError(f"FINETUNE_LOOP: {error}") from error
    loops, outside = load_loops(), loops_dir()
    if not loops:
        raise SettingsError(
            f"no loop is declared under {' or '.join(map(str, loop_folders()))}; "
            "docs/how-to/declare-a-loop.md shows how to write one"
        )
    candidates = loops if outside is None else load_loops([outside])
    if not candidates:
        raise SettingsError(
            f"FINETUNE_LOOPS_DIR is {outside}, which has no <loop>/defs.yaml. Write one, unset the variable, or choose "
            f"a loop with --loop: {', '.join(loops)}."
        )
    if len(candidates) > 1:
        raise SettingsError(
            f"several loops are declared; choose one with --loop or FINETUNE_LOOP: {', '.join(candidates)}"
        )
    return next(iter(candidates.values()))


def with_loop(command: str, loop: LoopSettings) -> str:
    """Return a command for a loop, with --loop if the command would take another loop without it."""
    try:
        needed = the_loop(None).name != loop.name
    except SettingsError:
        needed = True
    return f"{command} --loop {loop.name}" if needed else command
