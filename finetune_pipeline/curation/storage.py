"""Rows as a Hugging Face dataset with the splits train and validation, written and read back. Loads datasets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def save_splits(folder: Path, splits: Mapping[str, Sequence[Any]], columns: Mapping[str, str]) -> None:
    """Write a DatasetDict.

    Args:
        folder: where to.
        splits: rows by the name of their split, objects with an attribute for each column.
        columns: the type of each column: string, float64, bool, or turns (a conversation).
    """
    import datasets

    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = datasets.Features(
        {name: turns if kind == "turns" else datasets.Value(kind) for name, kind in columns.items()}
    )
    datasets.disable_progress_bars()
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({c: [_cell(row, c) for row in rows] for c in columns}, features)
            for split, rows in splits.items()
        }
    ).save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))  # an empty split has no shard by itself


def read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a written DatasetDict."""
    import datasets

    return list(datasets.load_from_disk(str(folder))[split])


def _cell(row: Any, column: str) -> Any:
    value = getattr(row, column)
    return [turn.model_dump() for turn in value] if column == "history" else value
