"""Rows as a Hugging Face dataset with the splits train and validation, written and read back. Loads pyarrow.

pyarrow writes the layout that `datasets.load_from_disk` reads: to load that library takes a second, half as long
as to curate 10,000 rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune_pipeline.artifacts import hash_file, write_text

_DATA = "data-00000-of-00001.arrow"
_AT_ONCE = 10_000  # rows of a record batch


class SplitWriter:
    """Writes a DatasetDict table by table; the same rows give the same files, in whatever tables they come."""

    def __init__(self, folder: Path, columns: Mapping[str, str], splits: Sequence[str]) -> None:
        """Start writing.

        Args:
            folder: where to.
            columns: the type of each column: string, float64, bool, or turns (a conversation).
            splits: names of the splits; each is there, if only empty.
        """
        import pyarrow as pa

        turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
        self.schema = pa.schema(
            {name: turns if kind == "turns" else pa.type_for_alias(kind) for name, kind in columns.items()}
        )
        """The Arrow schema of the rows."""
        self._folder = folder
        for split in splits:
            (folder / split).mkdir(parents=True)
        self._writers = {split: pa.ipc.new_stream(folder / split / _DATA, self.schema) for split in splits}
        self._waiting = dict.fromkeys(splits, self.schema.empty_table())

    def write(self, split: str, rows: Any) -> None:
        """Add a table of rows to a split."""
        import pyarrow as pa

        rows = pa.concat_tables([self._waiting[split], rows.cast(self.schema)])
        full = rows.num_rows - rows.num_rows % _AT_ONCE
        self._write(split, rows.slice(0, full))
        self._waiting[split] = rows.slice(full)

    def _write(self, split: str, rows: Any) -> None:
        import pyarrow as pa

        for start in range(0, rows.num_rows, _AT_ONCE):
            # Copied: a slice would be written with what lies around it in memory.
            batch = rows.take(pa.array(range(start, min(start + _AT_ONCE, rows.num_rows))))
            self._writers[split].write_table(batch.combine_chunks())

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split, writer in self._writers.items():
            if error is None:
                self._write(split, self._waiting[split])
            writer.close()
        if error is None:
            self._describe()

    def _describe(self) -> None:
        """What the library wants to find beside the rows; it takes their types from the files."""
        for split in self._writers:
            folder = self._folder / split
            state: dict[str, Any] = {
                "_data_files": [{"filename": _DATA}],
                "_fingerprint": hash_file(folder / _DATA)[:16],  # the cache of what is computed of the rows goes by it
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            _write_json(folder / "state.json", state)
            _write_json(folder / "dataset_info.json", {})
        _write_json(self._folder / "dataset_dict.json", {"splits": list(self._writers)})


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a written DatasetDict."""
    return list(iterate_split(folder, split))


def iterate_split(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The same, one after the other, with only a part of them in memory."""
    import pyarrow as pa

    with pa.memory_map(str(folder / split / _DATA)) as file, pa.ipc.open_stream(file) as batches:
        yield from chain.from_iterable(batch.to_pylist() for batch in batches)
