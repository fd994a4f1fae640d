"""The examples of a job as memory-mapped token ids, cached beside the dataset. Loads datasets and transformers."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import hash_file, hash_of, package_versions
from finetune_pipeline.settings import REPLAY, TrainingSettings
from finetune_pipeline.training.conversations import RejectedRow, TokenizedRow, count_rejections, tokenize_rows
from finetune_pipeline.training.job import JobConfig, Rejection, TrainingError
from finetune_pipeline.training.reward_sampling import sample_by_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CACHE = ".tokenized"
_CACHE_FORMAT = 8  # of what the cache holds: files of another one are not read
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_ROWS_PER_BATCH = 1000
LOSS_SAMPLE = 256  # training examples on which the loss is measured without a validation set
_TEXTS = ("prompt", "history")
_OPTIONAL = ("reward", "label", "source", "provenance", "interaction_id")
_REASON, _PROVENANCE = "rejected", "rejected_provenance"  # of a row that the chat template rejects; it has no tokens


@dataclass(frozen=True)
class TrainingData:
    """The tokenized examples of a job.

    Attributes:
        train: examples to train on. For sft: `input_ids`, `labels` (IGNORE_INDEX on the prompt), `length` in tokens,
            `reward` and `replayed`; for dpo and kto: the columns of TRL's collators, and `length`.
        validation: examples on which the loss before and after is measured, in the form of sft: the validation set,
            or a sample of the training examples without one.
        has_validation: whether `validation` is a validation set.
        too_long: training examples left out for having more than max_length tokens.
        preference_validation: dpo and kto: the validation set of the method's own loss.
        rejections: examples left out because the chat template rejects them.
    """

    train: "Dataset"
    validation: "Dataset"
    has_validation: bool
    too_long: int
    preference_validation: "Dataset | None" = None
    rejections: tuple[Rejection, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example that is trained on or measured."""
        return max(int(max(split.with_format("numpy")["length"][:])) for split in (self.train, self.validation))


def load_data(job: JobConfig, tokenizer: "PreTrainedTokenizerBase") -> TrainingData:
    """Load the prompt-completion dataset of a job as tokens.

    Raises:
        TrainingError: it is missing, lacks a column, or nothing of it can be trained on.
    """
    settings = job.settings
    if not (job.dataset / "dataset_dict.json").is_file():
        raise TrainingError(f"{job.dataset} holds no saved DatasetDict; rebuild the dataset")
    accepted, rejected = _tokenize_prompt_completion(job, "train", tokenizer)
    train = short_enough(accepted, settings.max_length)
    too_long = len(accepted) - len(train)
    if not len(train) or (settings.method == "sft" and all(train["replayed"])):
        raise TrainingError(nothing_left(too_long, len(accepted), settings.max_length, rejected))
    validation_rows, rejected_validation = _tokenize_prompt_completion(job, "validation", tokenizer)
    validation = short_enough(validation_rows, settings.max_length)
    if settings.method == "sft" and not len(validation) and (len(validation_rows) or settings.early_stopping_patience):
        warn_not_validated(settings, len(validation_rows))
    if settings.reward_weighted and settings.method == "sft":
        rewards = list(train["reward"])
        if set(rewards) == {None}:
            raise TrainingError(f"{job.dataset / 'train'} lacks the column reward; rebuild the dataset")
        # The sample is drawn before training, so that a resumed run sees the same examples.
        train = train.select(sample_by_reward(rewards, settings.seed))
    return TrainingData(
        train=train,
        validation=validation if len(validation) else train.select(range(min(len(train), LOSS_SAMPLE))),
        has_validation=bool(len(validation)),
        too_long=too_long,
        rejections=rejected + rejected_validation,
    )


def is_replayed(row: dict[str, Any]) -> bool:
    """Return whether a row is replay data. A dataset of replay data alone is not trained on."""
    return bool(row.get("source") == REPLAY)


def nothing_left(too_long: int, accepted: int, max_length: int, rejected: tuple[Rejection, ...] = ()) -> str:
    """Return the error message for a dataset in which every usable example is replay data.

    Args:
        accepted: number of examples that the chat template accepts; `too_long` of them exceed `max_length`.
    """
    examples = accepted + sum(one.count for one in rejected)
    reasons, remedies = [], []
    if rejected:
        reasons.append("; ".join(f"{one.count} of {examples} examples are rejected: {one}" for one in rejected))
        remedies.append("use a base model whose chat template accepts such conversations")
    if too_long or not rejected:
        reasons.append(f"{too_long} of {examples} examples have more than {max_length} tokens")
        remedies.append("raise max_length")
    if too_long < accepted:
        reasons[-1] += f", and the other {accepted - too_long} are replay examples"
    return f"nothing is left to train on: {'; '.join(reasons)}; {', '.join(remedies)}, or add examples"


def warn_not_validated(settings: TrainingSettings, validation_rows: int) -> None:
    """Log that there is no validation: all validation examples are too long, or there are none."""
    why = f"all {validation_rows} validation examples have more than {settings.max_length} tokens (raise max_length)"
    if not validation_rows:
        why = "the dataset has too few validation examples (raise curation.validation_fraction, or add examples)"
    stopping = " and early_stopping_patience does nothing" if settings.early_stopping_patience else ""
    print(f"the run is not validated, so the last weights are kept{stopping}: {why}", file=sys.stderr, flush=True)


def tokenize_split(
    folder: Path,
    split: str,
    completions: Sequence[str],
    job: JobConfig,
    tokenizer: "PreTrainedTokenizerBase",
    features: dict[str, Any],
    columns_of: Callable[[dict[str, Any], TokenizedRow], dict[str, Any]],
) -> "tuple[Dataset, tuple[Rejection, ...]]":
    """Tokenize a split of a saved dataset in batches, or read the tokens that an earlier run cached.

    The cache is in the dataset's own folder, so that deleting the texts deletes their tokens too. It is written to a
    temporary file and renamed, so a killed process leaves no incomplete one.

    Args:
        completions: the columns that hold a completion.
        features: of the columns to make; `length` is added.
        columns_of: makes these columns from a row and its tokens.

    Returns:
        The rows that the chat template accepts, and the others, counted by reason.
    """
    from datasets import Dataset, Features, Value, load_from_disk

    kinds = {**features, "length": Value("int32"), _REASON: Value("string"), _PROVENANCE: Value("string")}
    files = data_files(folder / split)
    rows = load_from_disk(str(folder / split)) if files else None  # datasets cannot read a split without files
    if rows is None or not len(rows):
        empty = Dataset.from_dict({name: [] for name in kinds}, Features(kinds))
        return empty.remove_columns([_REASON, _PROVENANCE]), ()
    missing = {*_TEXTS, *completions} - set(rows.column_names)
    if missing:
        names = " and ".join(sorted(missing))
        raise TrainingError(
            f"{folder / split} lacks the {'column' if len(missing) == 1 else 'columns'} {names}; rebuild the dataset"
        )

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        batch_rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        tokenized = tokenize_rows(batch_rows, completions, job.system_prompt, tokenizer)
        made = [
            {_REASON: found.reason, _PROVENANCE: found.provenance}
            if isinstance(found, RejectedRow)
            else {**columns_of(row, found), "length": found.length}
            for row, found in zip(batch_rows, tokenized, strict=True)
        ]
        return {name: [columns.get(name) for columns in made] for name in kinds}

    # The key is a hash of everything that decides the tokens: rows, system prompt and tokenizer.
    hashed = [*files, *sorted(path for pattern in _TOKENIZER_FILES for path in job.base_model.glob(pattern))]
    hashes = {path.name: hash_file(path) for path in hashed}
    packages = package_versions("transformers", "tokenizers")
    key = hash_of([_CACHE_FORMAT, job.system_prompt, hashes, packages])[:16]
    cache = folder / CACHE / f"{split}-{key}.arrow"
    with suppress(OSError):  # a dataset may be on a read-only disk; its tokens are then kept in memory
        cache.parent.mkdir(exist_ok=True)
    keep = os.access(cache.parent, os.W_OK)
    texts = rows.select_columns([*_TEXTS, *completions, *(name for name in _OPTIONAL if name in rows.column_names)])
    tokens = texts.map(
        tokenize,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=texts.column_names,
        features=Features(kinds),
        cache_file_name=str(cache) if keep else None,
        keep_in_memory=not keep,
        new_fingerprint=key,
    )
    reasons = list(tokens[_REASON])
    rejected = [index for index, reason in enumerate(reasons) if reason]
    rejections = count_rejections(
        (RejectedRow(reasons[index], tokens[index][_PROVENANCE]) for index in rejected), len(reasons), split
    )
    if rejected:
        tokens = tokens.select([index for index, reason in enumerate(reasons) if not reason])
    return tokens.remove_columns([_REASON, _PROVENANCE]), rejections


def short_enough(rows: "Dataset", max_length: int) -> "Dataset":
    """Return the rows of at most `max_length` tokens."""
    kept = [index for index, length in enumerate(rows["length"]) if length <= max_length]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _tokenize_prompt_completion(
    job: JobConfig, split: str, tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[Dataset, tuple[Rejection, ...]]":
    from datasets import List, Value

    def columns_of(row: dict[str, Any], tokens: TokenizedRow) -> dict[str, Any]:
        return {
            "input_ids": tokens.conversations["completion"],
            "labels": tokens.labels(),
            "reward": None if is_replayed(row) else row.get("reward"),
            "replayed": is_replayed(row),
        }

    features = {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "reward": Value("float64"),  # None for replayed examples
        "replayed": Value("bool"),
    }
    return tokenize_split(job.dataset, split, ("completion",), job, tokenizer, features, columns_of)


def data_files(split: Path) -> list[Path]:
    """Return the Arrow files of a saved split; other files may be beside them. Empty if there is no such split."""
    state = split / "state.json"
    if not state.is_file():
        return []
    return [split / file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
