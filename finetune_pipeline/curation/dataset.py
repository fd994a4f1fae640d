"""From examples to a training set: redact, decide, deduplicate, split, mix in what must not be forgotten, write.

`sifting` looks at each example alone, `choosing` compares them by what that left of them, and here the chosen rows are
read once more, redacted and written. A million rows go through this in bounded memory as ten do.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.formats import alpaca
from finetune_pipeline.curation.preferences import (
    LABELLED,
    LABELLED_COLUMNS,
    PAIR_COLUMNS,
    PAIRS,
    Labelled,
    Pair,
)
from finetune_pipeline.curation.provenance import OriginsWriter
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.curation.rules import Policy, near_benchmark
from finetune_pipeline.curation.storage import SplitWriter, iterate_split, read_split
from finetune_pipeline.records import Example, Turn, conversation_text, loss_mask_field, normalize

if TYPE_CHECKING:
    import pyarrow as pa

    from finetune_pipeline.curation.chosen import Chosen
    from finetune_pipeline.curation.sifted import Cache

DATASET = "dataset"
COLUMNS = {
    "prompt": "string", "history": "turns", "completion": "string", "reward": "float64", "source": "string",
    "provenance": "string", "interaction_id": "string", "content_hash": "string",
}  # fmt: skip
SPLITS = ("train", "validation")

Identity = Callable[[Example], str]
"""The content hash of an example: by it the store knows the example again after it was judged."""


@dataclass(frozen=True)
class Row:
    """One row of the dataset."""

    prompt: str
    completion: str
    reward: float
    source: str
    provenance: str | None = None
    interaction_id: str | None = None
    history: tuple[Turn, ...] = ()
    content_hash: str | None = None

    @property
    def question(self) -> str:
        """The prompt with what was said before it."""
        return conversation_text(self.prompt, self.history)


@dataclass(frozen=True, eq=False)
class Curated:
    """A dataset before it is written, with what was left out and why.

    Its rows are read when they are asked for: `train`, `validation`, `pairs` and `undesirable` are for few of them.

    Attributes:
        chosen: where the rows are.
        replay: replayed rows, which stand at the end of `train`.
        left_out: why how many examples are not in train or validation.
        redacted: kind of secret or personal data -> places where it was replaced.
        near_benchmark: interaction ids taken out as near-duplicates of the benchmark, or for containing some of it.
        conflicts: interaction ids of an answer that was kept and of another to the same question, the first ones.
    """

    chosen: "Chosen"
    replay: tuple[Row, ...]
    left_out: dict[str, int]
    redacted: dict[str, int]
    near_benchmark: tuple[str, ...]
    conflicts: tuple[tuple[str, str], ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curated) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self.near_benchmark)

    def _content(self) -> list[Any]:
        rows = [self.train, self.validation, self.pairs, self.undesirable]
        return [*rows, self.left_out, self.redacted, self.near_benchmark, self.conflicts]

    @cached_property
    def train(self) -> tuple[Row, ...]:
        """Answers to learn, the last `replayed` of them replayed ones."""
        return (*self._rows("train"), *self.replay)

    @cached_property
    def validation(self) -> tuple[Row, ...]:
        """Answers to validate with."""
        return self._rows("validation")

    @property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        """Corrected answers beside the model's own, by split."""
        return {split: tuple(_pair(row) for row in self.chosen.rows(PAIRS, split)) for split in SPLITS}

    @property
    def undesirable(self) -> dict[str, tuple[Labelled, ...]]:
        """Answers found bad, by split."""
        return {split: tuple(_bad(row) for row in self.chosen.rows(LABELLED, split)) for split in SPLITS}

    def _rows(self, split: str) -> tuple[Row, ...]:
        return tuple(_row(row) for row in self.chosen.rows(DATASET, split))

    @property
    def replayed(self) -> int:
        """Examples mixed in against forgetting."""
        return len(self.replay)

    @property
    def sources(self) -> dict[str, int]:
        """Source -> examples of train and validation."""
        return dict(sorted((self.chosen.sources + Counter(row.source for row in self.replay)).items()))

    @property
    def examples(self) -> int:
        """Examples from use: train and validation without the replayed ones."""
        return sum(self.count(DATASET, split) for split in SPLITS)

    def sample(self, count: int) -> list[Row]:
        """The first rows of each source, the replayed ones last: at most `count` of each."""
        return [*(_row(row) for row in self.chosen.sample(count)), *self.replay[:count]]

    def count(self, part: str, split: str) -> int:
        """Rows of a split without the replayed ones: of DATASET, of PAIRS, or answers found bad (LABELLED)."""
        return self.chosen.count(part, split)


def curate(examples: Iterable[Example], replay: Sequence[Row], policy: Policy, identity: Identity) -> Curated:
    """Build the dataset, with secrets and personal data replaced; the same examples in any order give the same one."""
    from finetune_pipeline.curation.snapshot import Part, table_of

    return _curate([Part(table_of(examples))], replay, policy, identity, None)


def curate_files(
    paths: Sequence[Path], replay: Sequence[Row], policy: Policy, identity: Identity, cache: "Cache | None" = None
) -> Curated:
    """Build the dataset of a snapshot's Parquet files, of which a later one's row of an interaction stands.

    Args:
        policy, identity: are sent to other processes where there are many rows.
        cache: where what was found of each file is kept, so that the next time only new files are looked at.
    """
    from finetune_pipeline.curation.snapshot import Part

    return _curate([Part(path) for path in paths], replay, policy, identity, cache)


def _curate(
    parts: Sequence[Any], replay: Sequence[Row], policy: Policy, identity: Identity, cache: "Cache | None"
) -> Curated:
    from finetune_pipeline.curation.chosen import Chosen

    chosen = Chosen.of(parts, policy, identity, cache)
    count = round(policy.settings.replay_ratio * chosen.count(DATASET, "train"))
    mixed_in, found = _replayed(replay, chosen.asks, count, policy)
    return Curated(
        chosen=chosen,
        replay=tuple(mixed_in),
        left_out=chosen.left_out,
        redacted=dict(sorted((found + Counter(chosen.redacted)).items())),
        near_benchmark=chosen.overlaps,
        conflicts=chosen.conflicts,
    )


def _row(row: Mapping[str, Any]) -> Row:
    return Row(**{**row, "history": turns(row)})


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(**{**row, "history": turns(row)})


def _bad(row: Mapping[str, Any]) -> Labelled:
    return Labelled(**{**row, "history": turns(row)})


def in_validation(question: str, share: float) -> bool:
    """Whether a question belongs to the validation set: fixed by its hash, so it never moves between cycles."""
    from finetune_pipeline.curation.sifting import side

    return side(normalize(question)) / 16**8 < share


def read_replay(path: Path) -> list[Row]:
    """Read a JSONL of prompt and completion, without rows that are not to be trained on.

    Raises:
        CurationError: the file is missing, or a line is not of this form.
    """
    if not path.is_file():
        raise CurationError(f"curation.replay: {path} is not there; correct the path in the loop's YAML, or remove it")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        provenance = f"{path.name}:{number}"
        try:
            document = json.loads(line)
            if document["prompt"] is None or document["completion"] is None:
                raise ValueError("null is no text")
            if not loss_mask_field(document):
                rows.append(Row(str(document["prompt"]), str(document["completion"]), 1.0, "replay", provenance))
        except (ValueError, KeyError, TypeError) as error:
            raise CurationError(
                f'{path}:{number}: expected {{"prompt": ..., "completion": ...}}, found {line[:80]!r} ({error!r})'
            ) from error
    return rows


def write_dataset(curated: Curated, folder: Path, system_prompt: str) -> None:
    """Write three Hugging Face datasets of the splits train and validation, and the first for Alpaca-style tools too.

    `dataset/` has the answers to learn (`train.alpaca.jsonl` and `validation.alpaca.jsonl` the same), `pairs/` the
    corrections with what the model had said, `labelled/` the answers found good (those of `dataset/`) and found bad.
    `provenances.csv` says where each row of `dataset/` came from.
    """
    import pyarrow as pa

    with (
        SplitWriter(folder / DATASET, COLUMNS, SPLITS) as dataset,
        SplitWriter(folder / PAIRS, PAIR_COLUMNS, SPLITS) as pairs,
        SplitWriter(folder / LABELLED, LABELLED_COLUMNS, SPLITS) as labelled,
        OriginsWriter(folder) as provenances,
        (folder / "train.alpaca.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.alpaca.jsonl").open("w", encoding="utf-8") as validation,
    ):
        replayed = pa.Table.from_pylist([_plain(row) for row in curated.replay], dataset.schema)
        for split, rows in chain(curated.chosen.tables(DATASET), [("train", replayed)]):
            dataset.write(split, rows)
            provenances.write(split, rows)
            good = rows.append_column("label", pa.repeat(True, rows.num_rows))
            labelled.write(split, good.select(list(LABELLED_COLUMNS)))
            (train if split == "train" else validation).writelines(_alpaca_lines(rows, system_prompt))
        for split, rows in curated.chosen.tables(LABELLED):
            labelled.write(split, rows)
        for split, rows in curated.chosen.tables(PAIRS):
            pairs.write(split, rows)


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(replace(row, history=())), "history": [turn.model_dump() for turn in row.history]}


def _alpaca_lines(rows: "pa.Table", system_prompt: str) -> Iterator[str]:
    for row in rows.to_pylist():
        yield json.dumps(alpaca(_row(row), system_prompt), ensure_ascii=False) + "\n"


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a written dataset's split: the answers to learn."""
    return read_split(folder / DATASET, split)


def learnt(folder: Path, split: str) -> Iterator[Row]:
    """The same as rows."""
    for row in read_rows(folder, split):
        yield Row(**{**row, "history": turns(row)})


def read_all(folder: Path) -> Iterator[dict[str, Any]]:
    """Every row that a written dataset holds, of both splits: answers to learn, pairs, and labelled answers."""
    for name in (DATASET, PAIRS, LABELLED):
        if (folder / name).is_dir():  # an older version of the project wrote the first one alone
            for split in SPLITS:
                yield from iterate_split(folder / name, split)


def overlaps(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Prompts among these rows, each named once, that are near a benchmark question."""
    seen: set[int] = set()  # of hashes: there may be millions
    found = []
    for row in rows:
        asked = hash((row["prompt"], history := turns(row)))
        if asked not in seen and near_benchmark(row["prompt"], history, policy):
            found.append(row["prompt"])
        seen.add(asked)
    return found


def turns(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """What was said before the prompt of a row that was read."""
    return tuple(Turn.model_validate(turn) for turn in row["history"])


def invalid_targets(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Answers to learn that do not pass the output schema: the prompt, and what is wrong."""
    seen: set[int] = set()
    found = []
    for row in rows:
        answer = row["chosen"] if "chosen" in row else row["completion"]
        key = hash((row["prompt"], answer))
        if row.get("label") is not False and key not in seen:
            seen.add(key)
            problem = policy.problem(answer)
            found += [] if problem is None else [f"{row['prompt']}: {problem}"]
    return found


def _replayed(
    replay: Sequence[Row], asks: Callable[[str], bool], count: int, policy: Policy
) -> tuple[list[Row], Counter[str]]:
    """The rows to mix in, and what was redacted in them.

    Args:
        asks: whether the dataset asks a question already.
        count: how many, if there are so many that neither the dataset nor the benchmark asks, and that do not belong
            to the validation set: who logs such a question later would find it there.
    """
    found: Counter[str] = Counter()
    chosen: list[Row] = []
    for original in sorted(replay, key=lambda row: hash_of(row.prompt)):
        if len(chosen) == count:
            break
        prompt, completion = redact(original.prompt), redact(original.completion)
        row = replace(original, prompt=prompt.text, completion=completion.text)
        if in_validation(row.question, policy.settings.validation_fraction) or asks(row.question):
            continue
        if near_benchmark(row.prompt, row.history, policy):
            continue
        found.update(prompt.counts)
        found.update(completion.counts)
        chosen.append(row)
    return chosen, found
