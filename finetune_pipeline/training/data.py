"""The examples of a job, as the trainer takes them. Loads datasets and transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.records import Turn, chat
from finetune_pipeline.training.job import TrainingError, TrainingJob

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("prompt", "history", "completion")
_LOSS_SAMPLE = 256  # examples on which the loss is measured where there is no validation set


@dataclass(frozen=True)
class Data:
    """What a job trains on."""

    train: "Dataset"
    measure: "Dataset"  # on which the loss before and after is measured
    too_long: int
    longest: int  # tokens, of what is trained or measured on


def tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The base model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load(job: TrainingJob, tokenizer: "PreTrainedTokenizerBase") -> Data:
    """Read the dataset of a job.

    Raises:
        TrainingError: it is not there, lacks a column, or every example is too long.
    """
    from datasets import Dataset

    rows = _split(job.dataset, "train")
    train, too_long, longest = _short_enough(rows, job, tokenizer)
    if not train:
        raise TrainingError(
            f"nothing is left to train on: {too_long} of {len(rows)} examples have more than "
            f"{job.settings.max_length} tokens; raise max_length, or add examples"
        )
    validation, _, longest_measured = _short_enough(_split(job.dataset, "validation"), job, tokenizer)
    measure = validation or train[:_LOSS_SAMPLE]
    return Data(Dataset.from_list(train), Dataset.from_list(measure), too_long, max(longest, longest_measured))


def _split(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a saved split; a missing one has none, and an empty one neither (datasets cannot read that back)."""
    from datasets import load_from_disk

    if not (folder / "dataset_dict.json").is_file():
        raise TrainingError(f"{folder} holds no saved DatasetDict; make the dataset again")
    state = folder / name / "state.json"
    if not state.is_file() or not json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        return []
    rows = load_from_disk(str(folder / name))
    missing = set(_COLUMNS) - set(rows.column_names)
    if missing:
        raise TrainingError(f"{folder / name} lacks the column {' and '.join(sorted(missing))}; make the dataset again")
    return list(rows.select_columns(list(_COLUMNS)))


def _short_enough(
    rows: list[dict[str, Any]], job: TrainingJob, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[dict[str, Any]], int, int]:
    """TRL's conversational form of the rows of at most max_length tokens, the number of the others, the most tokens."""
    examples: list[dict[str, Any]] = [
        {
            "prompt": chat(job.system_prompt, row["prompt"], [Turn.model_validate(turn) for turn in row["history"]]),
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    if not examples:
        return [], 0, 0
    texts = tokenizer.apply_chat_template([e["prompt"] + e["completion"] for e in examples], tokenize=False)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = [(e, len(ids)) for e, ids in zip(examples, tokens, strict=True) if len(ids) <= job.settings.max_length]
    return [e for e, _ in kept], len(examples) - len(kept), max((length for _, length in kept), default=0)
