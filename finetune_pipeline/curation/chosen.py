"""The rows that were chosen, redacted, as tables of the columns that are written. Loads numpy and pyarrow."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.choosing import Choice, Found, Numbers, choose
from finetune_pipeline.curation.dataset_files import PREFERENCE, UNPAIRED_PREFERENCE
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.sifted import Cache, sift_parts
from finetune_pipeline.curation.sifting import Identity, example_of_row, number_of
from finetune_pipeline.curation.snapshot import ROWS, Part, Rows, schema
from finetune_pipeline.records import Turn, conversation_text, normalize
from finetune_pipeline.settings import LOGS

if TYPE_CHECKING:
    import pyarrow as pa

# What is in memory at once, at most; for each so many rows, or bytes of text, the snapshot is read once. A column of
# more than 2 GiB cannot be put together.
_WINDOW, _BYTES = 200_000, 2**29


class Chosen:
    """Which rows of a snapshot make the dataset, and the way to them."""

    def __init__(self, rows: Rows, found: Found, choice: Choice, validation_fraction: float) -> None:
        self._rows, self._found, self._choice, self._share = rows, found, choice, validation_fraction
        self._questions = found.of("question", choice.kept)

    @classmethod
    def of(cls, parts: Sequence[Part], policy: Policy, identity: Identity, cache: Cache | None) -> "Chosen":
        """Look at every row, then choose among them."""
        rows = Rows(parts)
        found = Found(sift_parts(parts, policy, identity, cache), rows.superseded())

        def texts(places: Numbers) -> list[str]:
            """Questions in their normalised form."""
            windows = (_redacted(rows, found, window, ("prompt", "history")) for window in _windows(found, places))
            return [normalize(_question(row)) for table in windows for row in table.to_pylist()]

        return cls(
            rows, found, choose(found, policy.settings, policy.quotas, texts), policy.settings.validation_fraction
        )

    @property
    def left_out(self) -> dict[str, int]:
        """Why how many examples do not train."""
        return self._choice.left_out

    @property
    def redacted(self) -> dict[str, int]:
        """Kind of secret or personal data -> places where it was replaced in what is learnt."""
        return self._choice.redacted

    @property
    def overlaps(self) -> tuple[str, ...]:
        """Ids of interactions that are near the benchmark, or contain some of it."""
        return tuple(sorted(self._ids(self._choice.overlaps)))

    @property
    def conflicts(self) -> tuple[tuple[str, str], ...]:
        """Ids of an answer that was kept, and of another to the same question."""
        ids = self._ids(np.array(self._choice.conflicts, np.int64).reshape(-1))
        return tuple(zip(ids[::2], ids[1::2], strict=True))

    def _ids(self, places: Numbers) -> list[str]:
        return list(self._rows.take(places, ["interaction_id"])["interaction_id"].to_pylist()) if len(places) else []

    @property
    def sources(self) -> Counter[str]:
        """Source -> rows to learn."""
        counted = self._found.texts("source", self._choice.kept).fill_null(LOGS).value_counts().to_pylist()
        return Counter({one["values"]: one["counts"] for one in counted})

    def sample(self, count: int) -> list[dict[str, Any]]:
        """The first rows to learn of each source: at most `count` of each, in the order of the sources' names."""
        kept = self._choice.kept
        names = self._found.texts("source", kept).fill_null(LOGS).to_numpy(zero_copy_only=False)
        places = [kept[names == name][:count] for name in sorted(set(names.tolist()))]
        if not places:
            return []
        window = np.concatenate(places)
        return list(_learnt(_redacted(self._rows, self._found, window, ROWS), self._found, window).to_pylist())

    def asks(self, question: str) -> bool:
        """Whether a question is among those that are learnt."""
        number = np.uint64(number_of(normalize(question)))
        at = int(np.searchsorted(self._questions, number))
        return at < len(self._questions) and bool(self._questions[at] == number)

    def count(self, part: str, split: str) -> int:
        """How many rows a split has."""
        validates = int(self._validates(self._all(part)).sum())
        return validates if split == "validation" else len(self._all(part)) - validates

    def rows(self, part: str, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split."""
        for name, table in self.tables(part):
            yield from table.to_pylist() if name == split else ()

    def tables(self, part: str) -> "Iterator[tuple[str, pa.Table]]":
        """The rows with the columns that are written, as many at a time as memory holds, each with its split."""
        import pyarrow as pa

        for window in _windows(self._found, self._all(part)):
            rows = _AS.get(part, _learnt)(_redacted(self._rows, self._found, window, ROWS), self._found, window)
            validates = self._validates(window)
            yield "train", rows.filter(pa.array(~validates))
            yield "validation", rows.filter(pa.array(validates))

    def _all(self, part: str) -> Numbers:
        return {PREFERENCE: self._choice.pairs, UNPAIRED_PREFERENCE: self._choice.undesirable}.get(
            part, self._choice.kept
        )

    def _validates(self, places: Numbers) -> Numbers:
        return np.asarray(self._found.of("side", places) / 16**8 < self._share)


def _windows(found: Found, places: Numbers) -> Iterator[Numbers]:
    """The places in their order, as many at a time as may be in memory."""
    ends = np.cumsum(found.of("length", places), dtype=np.int64)
    start, before = 0, 0
    while start < len(places):
        fitting = int(np.searchsorted(ends, before + _BYTES, "right"))
        end = min(start + _WINDOW, max(start + 1, fitting))
        yield places[start:end]
        start, before = end, int(ends[end - 1])


def _redacted(rows: Rows, found: Found, places: Numbers, columns: Sequence[str]) -> "pa.Table":
    """The rows of these places with what the first pass found in them replaced; most have nothing, and stay as read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = rows.take(places, columns)
    touched = pc.is_valid(found.texts("redacted", places)).to_numpy()
    if not touched.any():
        return table
    whole = table.filter(pa.array(touched)) if set(columns) == set(ROWS) else rows.take(places[touched], ROWS)
    given = whole.to_pylist()
    clean = [redact_example(example_of_row(row)).example.model_dump(mode="json") for row in given]
    mended = pa.Table.from_pylist(clean, schema()).select(list(columns))
    order = np.where(touched, len(table) + np.cumsum(touched) - 1, np.arange(len(table)))
    return pa.concat_tables([table, mended.cast(table.schema)]).take(pa.array(order))


def _question(row: dict[str, Any]) -> str:
    return conversation_text(row["prompt"], [Turn.model_construct(**turn) for turn in row["history"] or ()])


def _learnt(rows: "pa.Table", found: Found, places: Numbers) -> "pa.Table":
    import pyarrow as pa

    return pa.table(
        {
            **_asked(rows), "completion": rows["target"], "reward": rows["reward"],
            "source": rows["source"].fill_null(LOGS), "provenance": rows["provenance"],
            "interaction_id": rows["interaction_id"], "content_hash": found.texts("content", places),
        }
    )  # fmt: skip


def _pairs(rows: "pa.Table", found: Found, places: Numbers) -> "pa.Table":
    import pyarrow as pa

    answers = {"chosen": rows["target"], "rejected": rows["output"]}
    return pa.table({**_asked(rows), **answers, "interaction_id": rows["interaction_id"]})


def _bad(rows: "pa.Table", found: Found, places: Numbers) -> "pa.Table":
    import pyarrow as pa

    answers = {"completion": rows["output"], "label": pa.repeat(False, len(rows))}
    return pa.table({**_asked(rows), **answers, "interaction_id": rows["interaction_id"]})


_AS = {PREFERENCE: _pairs, UNPAIRED_PREFERENCE: _bad}


def _asked(rows: "pa.Table") -> "dict[str, pa.Array]":
    """Prompt and history; where there is none, it is empty and not null."""
    import pyarrow as pa

    history = rows["history"].combine_chunks()
    if history.null_count:
        history = pa.ListArray.from_arrays(history.offsets, history.values)
    return {"prompt": rows["prompt"], "history": history}
