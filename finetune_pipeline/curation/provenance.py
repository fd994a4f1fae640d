"""Where each example of a dataset came from, as a CSV file beside its card. Loads pyarrow."""

import csv
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

PROVENANCE_FILE = "provenances.csv"
_COLUMNS = ("source", "provenance", "interaction_id", "split")


class OriginsWriter:
    """Writes a line for each example: its source, where in it, the interaction's id, and the split; empty: unknown."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        from pyarrow.csv import CSVWriter

        self._schema = pa.schema(dict.fromkeys(_COLUMNS, pa.string()))
        self._writer: Any = CSVWriter(str(folder / PROVENANCE_FILE), self._schema)

    def write(self, split: str, rows: "pa.Table") -> None:
        """Add a table of the dataset's rows."""
        import pyarrow as pa

        told = rows.append_column("split", pa.repeat(split, rows.num_rows))
        self._writer.write_table(told.select(list(_COLUMNS)).cast(self._schema))

    def __enter__(self) -> "OriginsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def first_provenances(folder: Path, sources: Collection[str], each: int) -> dict[str, list[str]]:
    """Return the first provenances of each source, or interaction ids where it has none; reads no more than needed."""
    found: dict[str, list[str]] = defaultdict(list)
    missing = set(sources)
    with (folder / PROVENANCE_FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] in missing:
                found[row["source"]].append(row["provenance"] or row["interaction_id"])
                missing -= {row["source"]} if len(found[row["source"]]) == each else set()
            if not missing:
                break
    return dict(sorted(found.items()))
