"""Rows as a Hugging Face dataset with the splits train and validation, written and read back. Loads datasets."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune_pipeline.artifacts import hash_file


class SplitWriter:
    """Writes a DatasetDict table by table; the same rows give the same files.

    The tables go to a file of their own first, so that the rows are never all in memory; the library then lays the
    dataset out from there.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str], splits: Sequence[str]) -> None:
        """Start writing.

        Args:
            folder: where to.
            columns: the type of each column: string, float64, bool, or turns (a conversation).
            splits: names of the splits; each is there, if only empty.
        """
        import datasets
        import pyarrow as pa

        text = datasets.Value("string")
        turns = [{"role": text, "content": text}]
        self._features = datasets.Features(
            {name: turns if kind == "turns" else datasets.Value(kind) for name, kind in columns.items()}
        )
        self._folder = folder
        self._paths = {split: folder.with_name(f".{folder.name}.{split}.arrow") for split in splits}
        folder.parent.mkdir(parents=True, exist_ok=True)
        schema = self._features.arrow_schema
        self._writers = {split: pa.ipc.new_stream(str(path), schema) for split, path in self._paths.items()}

    @property
    def schema(self) -> Any:
        """The Arrow schema of the rows."""
        return self._features.arrow_schema

    def write(self, split: str, rows: Any) -> None:
        """Add a table of rows to a split."""
        self._writers[split].write_table(rows.cast(self._features.arrow_schema))

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        if error is None:
            self._lay_out()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def _lay_out(self) -> None:
        import datasets
        from datasets.table import MemoryMappedTable

        datasets.disable_progress_bars()
        info = datasets.DatasetInfo(features=self._features)
        held = {
            # By itself the library would make up a fingerprint from the file's time.
            split: datasets.Dataset(MemoryMappedTable.from_file(str(path)), info=info, fingerprint=hash_file(path)[:16])
            for split, path in self._paths.items()
        }
        datasets.DatasetDict(held).save_to_disk(self._folder, num_shards=dict.fromkeys(held, 1))


def read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a written DatasetDict."""
    return list(iterate_split(folder, split))


def iterate_split(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The same, one after the other, with only a part of them in memory."""
    import datasets

    for batch in datasets.load_from_disk(str(folder))[split].with_format("arrow").iter(10_000):
        yield from batch.to_pylist()
