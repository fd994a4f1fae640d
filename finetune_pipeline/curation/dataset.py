"""Build a dataset from a snapshot: filter -> deduplicate -> select -> split -> add replay -> write.

    1. `filter.py` reads each example alone: redact, filter, decontaminate, hash. Its results can be cached by shard.
    2. `select.py` compares the accepted examples by those hashes: one for each prompt, near-duplicates, quotas.
    3. Here the selected rows are read again, redacted, and written with replay examples by `dataset_files.py`.

A million rows go through this in bounded memory. Loads numpy and pyarrow.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.acceptance import Policy, benchmark_overlap
from finetune_pipeline.curation.dataset_files import (
    COLUMNS,
    PREFERENCE,
    PROMPT_COMPLETION,
    PROVENANCE_COLUMNS,
    PROVENANCE_FILE,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    DatasetSummary,
    DatasetWriter,
    author_hash,
    turns_of,
)
from finetune_pipeline.curation.export_formats import alpaca
from finetune_pipeline.curation.filter import FilterCache, FilterResult, Identity, filter_shards, hash64, split_hash
from finetune_pipeline.curation.redaction import redact_example, redact_texts
from finetune_pipeline.curation.select import select
from finetune_pipeline.curation.snapshot import COLUMNS as SNAPSHOT_COLUMNS
from finetune_pipeline.curation.snapshot import Array, Shard, Snapshot, example_of, row_of, schema
from finetune_pipeline.records import Turn, conversation_text, normalize
from finetune_pipeline.settings import LOGS, CurationSettings

if TYPE_CHECKING:
    import pyarrow as pa

# The most rows, or bytes of text, in memory at once; the snapshot is read once for each such window. A column of more
# than 2 GiB cannot be concatenated.
_WINDOW_ROWS, _WINDOW_BYTES = 200_000, 2**29


def curate(
    folder: Path,
    shards: Sequence[Path],
    replay: Sequence[DatasetExample],
    policy: Policy,
    identity: Identity,
    *,
    system_prompt: str = "",
    cache: FilterCache | None = None,
    sample_size: int = 2,
    validation_from: int | None = None,
    replay_ratio: Callable[[int], float] | None = None,
) -> DatasetSummary:
    """Build a dataset from a snapshot and write it; the same examples in any order give the same files.

    Args:
        folder: where the dataset is written.
        shards: Parquet files of the snapshot, oldest first; an interaction's row in a later one replaces earlier rows.
        replay: examples to add against catastrophic forgetting.
        policy, identity: are pickled where many rows are filtered in other processes.
        system_prompt: the instruction of the Alpaca files.
        cache: keeps the filter's result of each shard, so that the next dataset filters new shards only.
        sample_size: how many examples of each source the summary has.
        validation_from: index of the first row of the validation set, which goes to the last row; None: the hash of a
            prompt decides its split.
        replay_ratio: gives the replay ratio for a number of training examples; None: the setting.
    """
    snapshot = Snapshot([Shard(path) for path in shards])
    filtered = FilterResult(filter_shards(snapshot.shards, policy, identity, cache), snapshot.superseded())
    rows = _Rows(snapshot, filtered, policy.settings, validation_from)
    selection = select(filtered, policy.settings, policy.quotas, rows.prompts)
    indices = {
        PROMPT_COMPLETION: selection.examples,
        PREFERENCE: selection.pairs,
        UNPAIRED_PREFERENCE: selection.undesirable,
    }
    counts = {dataset_type: rows.count(found) for dataset_type, found in indices.items()}
    known_prompts = filtered.numbers("prompt", selection.examples)
    train = counts[PROMPT_COMPLETION]["train"]
    ratio = policy.settings.replay_ratio if replay_ratio is None else replay_ratio(train)
    replayed, replay_redacted = _select_replay(replay, known_prompts, round(ratio * train), policy)
    _write(folder, rows, indices, replayed, system_prompt)

    sources, source_codes = filtered.sources(selection.examples)
    source_counts = Counter(dict(zip(sources, np.bincount(source_codes, minlength=len(sources)).tolist(), strict=True)))
    conflict_ids = rows.ids(np.array(selection.conflicts, np.int64).reshape(-1))
    return DatasetSummary(
        rows=counts,
        replayed=len(replayed),
        sources=dict(sorted((source_counts + Counter(example.source for example in replayed)).items())),
        implicit=rows.count_implicit(selection.examples),
        left_out=selection.left_out,
        redacted=dict(sorted((replay_redacted + Counter(selection.redacted)).items())),
        near_benchmark=tuple(sorted(rows.ids(selection.near_benchmark))),
        conflicts=tuple(zip(conflict_ids[::2], conflict_ids[1::2], strict=True)),
        sample=(*rows.sample(selection.examples, sample_size), *replayed[:sample_size]),
    )


def in_validation(conversation: str, fraction: float) -> bool:
    """Return True if a conversation belongs to the validation set; its hash decides, so it never changes splits."""
    return split_hash(normalize(conversation)) / 2**32 < fraction


# --- Rows of the snapshot ---------------------------------------------------------------------------------------------


class _Rows:
    """Reads selected rows of a snapshot again, redacted, as tables of a dataset."""

    def __init__(
        self, snapshot: Snapshot, filtered: FilterResult, settings: CurationSettings, validation_from: int | None
    ) -> None:
        self._snapshot, self._filtered, self._validation_from = snapshot, filtered, validation_from
        self._fraction, self._redaction = settings.validation_fraction, settings.redaction

    def count(self, indices: Array) -> dict[str, int]:
        """Return split -> rows."""
        validation = int(self._in_validation(indices).sum())
        return {"train": len(indices) - validation, "validation": validation}

    def count_implicit(self, indices: Array) -> int:
        """Return how many rows are of answers that nobody objected to, and nobody approved."""
        import pyarrow.compute as pc

        rows = self._snapshot.take(indices, ["implicit", "review"])
        return int(pc.sum(pc.and_(rows["implicit"], pc.is_null(rows["review"]))).as_py() or 0)

    def ids(self, indices: Array) -> list[str]:
        """Return the interaction ids."""
        return list(self._snapshot.take(indices, ["interaction_id"])["interaction_id"].to_pylist())

    def prompts(self, indices: Array) -> list[str]:
        """Return the normalized conversations."""
        return [
            normalize(conversation_text(row["prompt"], [Turn.model_construct(**turn) for turn in row["history"] or ()]))
            for window in self._windows(indices)
            for row in self._redacted(window, ("prompt", "history")).to_pylist()
        ]

    def sample(self, indices: Array, count: int) -> Iterator[DatasetExample]:
        """Yield the first `count` examples of each source, sorted by the names of the sources."""
        sources, codes = self._filtered.sources(indices)
        for code in sorted(range(len(sources)), key=sources.__getitem__):
            table = self._table(PROMPT_COMPLETION, indices[codes == code][:count])
            yield from (DatasetExample(**{**row, "history": turns_of(row)}) for row in table.to_pylist())

    def tables(self, dataset_type: str, indices: Array) -> "Iterator[tuple[str, pa.Table]]":
        """Yield the rows as tables of a dataset type, each with its split; as many rows at once as fit into memory."""
        import pyarrow as pa

        for window in self._windows(indices):
            table, validation = self._table(dataset_type, window), self._in_validation(window)
            yield "train", table.filter(pa.array(~validation))
            yield "validation", table.filter(pa.array(validation))

    def _in_validation(self, indices: Array) -> Array:
        if self._validation_from is not None:
            return np.asarray(indices >= self._validation_from)
        return np.asarray(self._filtered.numbers("split", indices) / 2**32 < self._fraction)

    def _windows(self, indices: Array) -> Iterator[Array]:
        """Yield the indices in their order, as many at once as may be in memory."""
        ends = np.cumsum(self._filtered.numbers("bytes", indices), dtype=np.int64)
        start, before = 0, 0
        while start < len(indices):
            fitting = int(np.searchsorted(ends, before + _WINDOW_BYTES, "right"))
            end = min(start + _WINDOW_ROWS, max(start + 1, fitting))
            yield indices[start:end]
            start, before = end, int(ends[end - 1])

    def _table(self, dataset_type: str, indices: Array) -> "pa.Table":
        import pyarrow as pa

        rows = self._redacted(indices, SNAPSHOT_COLUMNS)
        history = rows["history"].combine_chunks()
        if history.null_count:  # without history it is empty, not null
            history = pa.ListArray.from_arrays(history.offsets, history.values)
        columns: dict[str, Any] = {"prompt": rows["prompt"], "history": history}
        if dataset_type == PROMPT_COMPLETION:
            columns |= {
                "completion": rows["target"],
                "reward": rows["reward"],
                "source": rows["source"].fill_null(LOGS),
            }
            columns |= {"provenance": rows["provenance"], "interaction_id": rows["interaction_id"]}
            columns |= {"content_hash": self._filtered.texts("content_hash", indices)}
            columns |= {"author": _authors(rows["user"])}
            columns |= {name: rows[name] for name in ("domain", "kind", "created_at")}
        elif dataset_type == PREFERENCE:
            columns |= {"chosen": rows["target"], "rejected": rows["output"], "interaction_id": rows["interaction_id"]}
        else:
            columns |= {"completion": rows["output"], "label": pa.repeat(False, len(rows))}
            columns |= {"interaction_id": rows["interaction_id"]}
        return pa.table(columns)

    def _redacted(self, indices: Array, columns: Sequence[str]) -> "pa.Table":
        """Return these rows, redacted again where the filter found something to redact; most rows stay as read."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self._snapshot.take(indices, columns)
        affected = pc.is_valid(self._filtered.texts("redacted", indices)).to_numpy()
        if not affected.any():
            return table
        # All columns: the provenance may be redacted too, and an example is redacted as a whole.
        whole = (
            table.filter(pa.array(affected))
            if set(columns) == set(SNAPSHOT_COLUMNS)
            else self._snapshot.take(indices[affected], SNAPSHOT_COLUMNS)
        )
        clean = [row_of(redact_example(example_of(row), self._redaction)[0]) for row in whole.to_pylist()]
        replaced = pa.Table.from_pylist(clean, schema()).select(list(columns))
        order = np.where(affected, len(table) + np.cumsum(affected) - 1, np.arange(len(table)))
        return pa.concat_tables([table, replaced.cast(table.schema)]).take(pa.array(order))


def _authors(users: "pa.ChunkedArray") -> "pa.Array":
    """Return the hashes that stand for users."""
    import pyarrow as pa

    names = users.combine_chunks().dictionary_encode()
    hashes = [name and author_hash(name) for name in names.dictionary.to_pylist()]
    return pa.array(hashes, pa.string()).take(names.indices)


# --- Replay -----------------------------------------------------------------------------------------------------------


def _select_replay(
    replay: Sequence[DatasetExample], known_prompts: Array, count: int, policy: Policy
) -> tuple[list[DatasetExample], Counter[str]]:
    """Return up to `count` replay examples, redacted, and what was redacted in them.

    An example is skipped if the dataset has its prompt already, if it overlaps with the benchmark, or if its prompt
    belongs to the validation set: logged later, the prompt would be validated with after it was trained on.

    Args:
        known_prompts: the hashes of the prompts of the dataset, ascending.
    """
    counts: Counter[str] = Counter()
    selected: list[DatasetExample] = []
    for original in sorted(replay, key=lambda example: hash_of(example.prompt)):
        if len(selected) == count:
            break
        (*history, prompt, completion), redacted = redact_texts(
            [*(turn.content for turn in original.history), original.prompt, original.completion],
            policy.settings.redaction,
        )
        turns = tuple(
            Turn(role=turn.role, content=content) for turn, content in zip(original.history, history, strict=True)
        )
        example = replace(original, prompt=prompt, completion=completion, history=turns)
        number = np.uint64(hash64(normalize(example.conversation)))
        at = int(np.searchsorted(known_prompts, number))
        if at < len(known_prompts) and known_prompts[at] == number:
            continue
        if in_validation(example.conversation, policy.settings.validation_fraction):
            continue
        if benchmark_overlap(example.prompt, example.history, policy):
            continue
        counts.update(redacted)
        selected.append(example)
    return selected, counts


# --- Files ------------------------------------------------------------------------------------------------------------


def _write(
    folder: Path, rows: _Rows, indices: dict[str, Array], replayed: Sequence[DatasetExample], system_prompt: str
) -> None:
    """Write the datasets of all three types, provenance.csv and an Alpaca file for each split."""
    import pyarrow as pa
    from pyarrow.csv import CSVWriter

    provenance_schema = pa.schema(dict.fromkeys(PROVENANCE_COLUMNS, pa.string()))
    with (
        DatasetWriter(folder / PROMPT_COMPLETION, COLUMNS[PROMPT_COMPLETION]) as examples,
        DatasetWriter(folder / PREFERENCE, COLUMNS[PREFERENCE]) as pairs,
        DatasetWriter(folder / UNPAIRED_PREFERENCE, COLUMNS[UNPAIRED_PREFERENCE]) as unpaired,
        CSVWriter(str(folder / PROVENANCE_FILE), provenance_schema) as provenance,
        (folder / "train.alpaca.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.alpaca.jsonl").open("w", encoding="utf-8") as validation,
    ):

        def write_examples(split: str, table: "pa.Table") -> None:
            examples.write(split, table)
            with_split = table.append_column("split", pa.repeat(split, table.num_rows))
            provenance.write_table(with_split.select(list(PROVENANCE_COLUMNS)).cast(provenance_schema))
            desirable = table.append_column("label", pa.repeat(True, table.num_rows))
            unpaired.write(split, desirable.select(list(COLUMNS[UNPAIRED_PREFERENCE])))
            for row in table.to_pylist():
                example = DatasetExample(**{**row, "history": turns_of(row)})
                line = json.dumps(alpaca(example, system_prompt), ensure_ascii=False) + "\n"
                (train if split == "train" else validation).write(line)

        for split, table in rows.tables(PROMPT_COMPLETION, indices[PROMPT_COMPLETION]):
            write_examples(split, table)
        plain = [
            {**asdict(replace(example, history=())), "history": [turn.model_dump() for turn in example.history]}
            for example in replayed
        ]
        write_examples("train", pa.Table.from_pylist(plain, examples.schema))
        for split, table in rows.tables(UNPAIRED_PREFERENCE, indices[UNPAIRED_PREFERENCE]):
            unpaired.write(split, table)
        for split, table in rows.tables(PREFERENCE, indices[PREFERENCE]):
            pairs.write(split, table)
