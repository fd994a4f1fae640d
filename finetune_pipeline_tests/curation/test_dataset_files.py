"""A written dataset is a DatasetDict for the datasets library, and its files depend on the rows only."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from finetune_pipeline.curation.dataset_files import DatasetWriter, read_split

COLUMNS = {"prompt": "string", "history": "turns", "reward": "float64", "label": "bool"}
TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    prompt=TEXT,
    history=[{"role": TEXT, "content": TEXT}],
    reward=datasets.Value("float64"),
    label=datasets.Value("bool"),
)
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"prompt {n} ünd 日本" if n % 5 else None,
        "history": [{"role": "user", "content": f"{n}"}] * (n % 3),
        "reward": n / 3,
        "label": n % 2 == 0,
    }
    for n in range(21_000)
]


def write(folder: Path, cuts: Sequence[int] = ()) -> Path:
    """Write all rows to the split train, in tables that end at these rows."""
    with DatasetWriter(folder, COLUMNS) as writer:
        for start, end in pairwise([0, *cuts, len(ROWS)]):
            writer.write("train", pa.Table.from_pylist(ROWS[start:end], writer.schema))
    return folder


def test_datasets_loads_it_with_types_and_empty_splits(tmp_path: Path) -> None:
    loaded = datasets.load_from_disk(str(write(tmp_path / "d")))
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"].to_list() == ROWS
    assert loaded["validation"].to_list() == []
    assert loaded["train"].features == loaded["validation"].features == FEATURES


def test_the_same_rows_in_other_tables_give_the_same_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", [1, 2, 2, 9_999, 10_000, 20_001])
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) == 7
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def test_the_fingerprint_depends_on_the_content(tmp_path: Path) -> None:
    def fingerprint(rows: list[dict[str, Any]], name: str) -> str:
        with DatasetWriter(tmp_path / name, COLUMNS) as writer:
            writer.write("train", pa.Table.from_pylist(rows, writer.schema))
        return str(datasets.load_from_disk(str(tmp_path / name))["train"]._fingerprint)

    assert fingerprint(ROWS[:3], "a") == fingerprint(ROWS[:3], "b") != fingerprint(ROWS[:4], "c")


def test_datasets_that_the_library_wrote_are_read(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS[:50], FEATURES)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d", num_shards={"train": 1})
    assert list(read_split(tmp_path, "d", "train")) == ROWS[:50]


def test_rows_are_streamed(tmp_path: Path) -> None:
    write(tmp_path / "d")
    rows = read_split(tmp_path, "d", "train")
    assert next(rows) == ROWS[0]
    rows.close()  # type: ignore[attr-defined]
    assert list(read_split(tmp_path, "d", "train")) == ROWS


def test_an_interrupted_write_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(KeyError), DatasetWriter(tmp_path / "d", COLUMNS) as writer:
        writer.write("train", pa.Table.from_pylist(ROWS[:5], writer.schema))
        writer.write("test", pa.Table.from_pylist(ROWS[:5], writer.schema))
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path / "d"))
