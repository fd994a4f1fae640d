"""Manifests: what each artifact of the pipeline records about itself."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from finetune_pipeline.records import Record, UtcDatetime

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Names that PEFT gives to the files of an adapter."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a tokenizer. They are copied unchanged next to merged weights, never saved again by transformers."""


class FileRecord(Record):
    """One file of an artifact."""

    sha256: str
    size: int = Field(ge=0, description="Bytes.")


class Manifest(Record):
    """Base class of manifests. A manifest is written last, so its presence means that the artifact is complete."""

    stage: ClassVar[str]
    blocking_checks: ClassVar[tuple[str, ...]] = ()
    """Checks that must pass before anything made from the artifact is promoted."""
    loop: str
    version: str = Field(description="Hash of inputs and settings, which determine the content.")
    created_at: UtcDatetime
    inputs: dict[str, str] = Field(description="What it was made from: name -> hash or version.")
    settings: dict[str, Any] = Field(description="The settings that it depends on.")
    packages: dict[str, str] = Field(description="Versions of the libraries that made it.")
    files: dict[str, FileRecord]


class RawLogsManifest(Manifest):
    """A snapshot of the loop's interactions and examples."""

    stage: ClassVar[str] = "raw_logs"
    interactions: int
    feedback: int
    examples: int = Field(description="Interactions with an example.")
    shards: list[str] = Field(
        description="Parquet files, oldest first; a later shard's row of an interaction replaces an earlier one."
    )
    new: int = Field(description="Rows of the newest shard: interactions that arrived or changed since the one before.")
    watermark: int = Field(description="Highest ingest offset in the snapshot.")


class DatasetManifest(Manifest):
    """The training and validation sets of curated_dataset."""

    stage: ClassVar[str] = "curated_dataset"
    blocking_checks: ClassVar[tuple[str, ...]] = ("enough_examples", "no_benchmark_overlap", "targets_parse")
    train: int = Field(description="Examples of prompt_completion/ to train on, replay included.")
    validation: int = Field(description="Validation examples of prompt_completion/.")
    replayed: int = Field(description="Replay examples in train, against catastrophic forgetting.")
    replay_reason: str = Field(default="", description="Why so many, if `training: auto` chose their number.")
    sources: dict[str, int] = Field(default={}, description="Source -> examples of train and validation.")
    left_out: dict[str, int] = Field(description="Reason -> examples left out.")
    redacted: dict[str, int] = Field(description="Kind of secret or personal data -> replacements in the examples.")
    near_benchmark: list[str] = Field(description="Ids of interactions left out for overlap with the benchmark.")
    conflicts: list[tuple[str, str]] = Field(
        default=[],
        description="Ids of the kept interaction and of one with another answer to the same prompt; the first ones.",
    )
    preference_pairs: int = Field(description="Rows of preference/ to train on.")
    desirable: int = Field(description="Desirable answers to train on, without replay.")
    undesirable: int = Field(description="Undesirable completions to train on.")
    watermark: int = Field(description="Last ingest offset of the snapshot that the dataset was built from.")


class AdapterManifest(Manifest):
    """A trained LoRA adapter."""

    stage: ClassVar[str] = "lora_adapter"
    base_model: str = Field(description="Folder of the base model.")
    base_hash: str
    mode: Literal["full", "incremental"]
    mode_reason: str = Field(default="", description="Why this mode, or from which version it was warm-started.")
    new_examples: int = Field(default=0, description="incremental: examples that the champion was not trained on.")
    method: Literal["sft", "dpo", "kto"] = Field(default="sft", description="The training method.")
    method_reason: str = Field(default="", description="Why this method: by settings, or because of the data.")
    settings_reason: str = Field(default="", description="Why these settings, if `training: auto` chose some.")
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


class ParityRecord(Record):
    """The exported model compared with the base and its unmerged adapter, in transformers, on the same prompts."""

    prompts: int
    same: int = Field(description="Equal answers.")
    score: float = Field(description="Mean score of the exported model, 0 to 1.")
    reference_score: float = Field(description="Mean score of the base with its unmerged adapter.")
    deviation: float = Field(description="Standard deviation of the differences between the scores of single prompts.")
    margin: float = Field(description="export.equivalence_margin at that time.")
    p_value: float = Field(description="Of the two one-sided paired t-tests.")
    interval_low: float = Field(description="90% confidence interval of score - reference_score.")
    interval_high: float
    equivalent: bool


class GgufManifest(Manifest):
    """An exported model: one GGUF, or an adapter for the base's GGUF, whose version is in `inputs`."""

    stage: ClassVar[str] = "gguf_model"
    blocking_checks: ClassVar[tuple[str, ...]] = ("loads_and_answers", "tokenizer_parity")
    form: Literal["merged", "adapter"] = "merged"
    gguf: str = Field(description="Name of the GGUF file in the artifact's folder: the merged model, or the adapter.")
    base_gguf_sha256: str | None = Field(default=None, description="Of the base's GGUF that the adapter is applied to.")
    quantization: str
    base_model: str
    base_hash: str
    adapter_version: str
    mode: Literal["full", "incremental"]
    datasets: dict[str, str] = Field(default={}, description="Datasets of the adapter; see AdapterManifest.")
    parity: ParityRecord | None = Field(default=None, description="None if the model does not run.")
    watermark: int


class BaseGgufManifest(Manifest):
    """The base model as a GGUF in the loop's quantization. It serves, and is compared with, without a champion."""

    stage: ClassVar[str] = "base_gguf"
    gguf: str = Field(description="Name of the GGUF file in the artifact's folder.")
    quantization: str
    base_hash: str


class MergedManifest(Manifest):
    """Base and adapter merged into one model in Hugging Face's format, for servers; it can be made again."""

    stage: ClassVar[str] = "merged_model"
    base_hash: str
    adapter_version: str


class ReportManifest(Manifest):
    """The report of a comparison of challenger and champion."""

    stage: ClassVar[str] = "eval_report"
    blocking_checks: ClassVar[tuple[str, ...]] = ("gain",)
    comparison_id: str
    challenger_sha256: str = Field(description="Of the GGUF that answered, or combined of base and adapter.")
    champion_id: str | None = Field(description="Registry id of the champion; None is the base model.")
    champion_sha256: str = Field(description="As challenger_sha256.")
    benchmark_sha256: str
    decision: Literal["promote", "reject", "inconclusive"]
    reason: str
    watermark: int

    @property
    def promote(self) -> bool:
        """Whether the challenger may become champion."""
        return self.decision == "promote"


class PromotionManifest(Manifest):
    """The model version that became champion."""

    stage: ClassVar[str] = "promoted_model"
    model_id: str
    model: str = Field(description="loop@version")
    fixed: int = Field(default=0, description="Corrections that it fixed, which are questions of the regression suite.")
    sealed: str = Field(default="", description="What the look at the sealed benchmark found; empty without one.")
    gguf_path: str
    previous_id: str | None
