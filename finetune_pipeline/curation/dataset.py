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
from finetune_pipeline.curation.acceptance import Policy, near_benchmark
from finetune_pipeline.curation.dataset_files import (
    COLUMNS,
    PREFERENCE,
    PROMPT_COMPLETION,
    SPLITS,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    DatasetWriter,
    ProvenanceWriter,
    read_all,
    turns_of,
)
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.export_formats import alpaca
from finetune_pipeline.curation.preferences import Labelled, Pair
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.records import Example, loss_mask_field, normalize
from finetune_pipeline.settings import REPLAY

if TYPE_CHECKING:
    import pyarrow as pa

    from finetune_pipeline.curation.chosen import Chosen
    from finetune_pipeline.curation.sifted import Cache

Identity = Callable[[Example], str]
"""The content hash of an example: by it the store knows the example again after it was judged."""


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
    replay: tuple[DatasetExample, ...]
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
    def train(self) -> tuple[DatasetExample, ...]:
        """Answers to learn, the last `replayed` of them replayed ones."""
        return (*self._rows("train"), *self.replay)

    @cached_property
    def validation(self) -> tuple[DatasetExample, ...]:
        """Answers to validate with."""
        return self._rows("validation")

    @property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        """Corrected answers beside the model's own, by split."""
        return {split: tuple(_pair(row) for row in self.chosen.rows(PREFERENCE, split)) for split in SPLITS}

    @property
    def undesirable(self) -> dict[str, tuple[Labelled, ...]]:
        """Answers found bad, by split."""
        return {split: tuple(_bad(row) for row in self.chosen.rows(UNPAIRED_PREFERENCE, split)) for split in SPLITS}

    def _rows(self, split: str) -> tuple[DatasetExample, ...]:
        return tuple(_row(row) for row in self.chosen.rows(PROMPT_COMPLETION, split))

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
        return sum(self.count(PROMPT_COMPLETION, split) for split in SPLITS)

    def sample(self, count: int) -> list[DatasetExample]:
        """The first rows of each source, the replayed ones last: at most `count` of each."""
        return [*(_row(row) for row in self.chosen.sample(count)), *self.replay[:count]]

    def count(self, part: str, split: str) -> int:
        """Return the number of rows of a split, without replay; of UNPAIRED_PREFERENCE the undesirable ones."""
        return self.chosen.count(part, split)


def curate(
    examples: Iterable[Example], replay: Sequence[DatasetExample], policy: Policy, identity: Identity
) -> Curated:
    """Build the dataset, with secrets and personal data replaced; the same examples in any order give the same one."""
    from finetune_pipeline.curation.snapshot import Part, table_of

    return _curate([Part(table_of(examples))], replay, policy, identity, None)


def curate_files(
    paths: Sequence[Path],
    replay: Sequence[DatasetExample],
    policy: Policy,
    identity: Identity,
    cache: "Cache | None" = None,
) -> Curated:
    """Build the dataset of a snapshot's Parquet files, of which a later one's row of an interaction stands.

    Args:
        policy, identity: are sent to other processes where there are many rows.
        cache: where what was found of each file is kept, so that the next time only new files are looked at.
    """
    from finetune_pipeline.curation.snapshot import Part

    return _curate([Part(path) for path in paths], replay, policy, identity, cache)


def _curate(
    parts: Sequence[Any], replay: Sequence[DatasetExample], policy: Policy, identity: Identity, cache: "Cache | None"
) -> Curated:
    from finetune_pipeline.curation.chosen import Chosen

    chosen = Chosen.of(parts, policy, identity, cache)
    count = round(policy.settings.replay_ratio * chosen.count(PROMPT_COMPLETION, "train"))
    mixed_in, found = _replayed(replay, chosen.asks, count, policy)
    return Curated(
        chosen=chosen,
        replay=tuple(mixed_in),
        left_out=chosen.left_out,
        redacted=dict(sorted((found + Counter(chosen.redacted)).items())),
        near_benchmark=chosen.overlaps,
        conflicts=chosen.conflicts,
    )


def _row(row: Mapping[str, Any]) -> DatasetExample:
    return DatasetExample(**{**row, "history": turns_of(row)})


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(**{**row, "history": turns_of(row)})


def _bad(row: Mapping[str, Any]) -> Labelled:
    return Labelled(**{**row, "history": turns_of(row)})


def in_validation(question: str, share: float) -> bool:
    """Whether a question belongs to the validation set: fixed by its hash, so it never moves between cycles."""
    from finetune_pipeline.curation.sifting import side

    return side(normalize(question)) / 16**8 < share


def read_replay(path: Path) -> list[DatasetExample]:
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
                rows.append(
                    DatasetExample(str(document["prompt"]), str(document["completion"]), 1.0, REPLAY, provenance)
                )
        except (ValueError, KeyError, TypeError) as error:
            raise CurationError(
                f'{path}:{number}: expected {{"prompt": ..., "completion": ...}}, found {line[:80]!r} ({error!r})'
            ) from error
    return rows


def write_dataset(curated: Curated, folder: Path, system_prompt: str) -> None:
    """Write the datasets of all three types, train.alpaca.jsonl, validation.alpaca.jsonl and provenance.csv."""
    import pyarrow as pa

    with (
        DatasetWriter(folder / PROMPT_COMPLETION, COLUMNS[PROMPT_COMPLETION]) as dataset,
        DatasetWriter(folder / PREFERENCE, COLUMNS[PREFERENCE]) as pairs,
        DatasetWriter(folder / UNPAIRED_PREFERENCE, COLUMNS[UNPAIRED_PREFERENCE]) as labelled,
        ProvenanceWriter(folder) as provenances,
        (folder / "train.alpaca.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.alpaca.jsonl").open("w", encoding="utf-8") as validation,
    ):
        replayed = pa.Table.from_pylist([_plain(row) for row in curated.replay], dataset.schema)
        for split, rows in chain(curated.chosen.tables(PROMPT_COMPLETION), [("train", replayed)]):
            dataset.write(split, rows)
            provenances.write(split, rows)
            good = rows.append_column("label", pa.repeat(True, rows.num_rows))
            labelled.write(split, good.select(list(COLUMNS[UNPAIRED_PREFERENCE])))
            (train if split == "train" else validation).writelines(_alpaca_lines(rows, system_prompt))
        for split, rows in curated.chosen.tables(UNPAIRED_PREFERENCE):
            labelled.write(split, rows)
        for split, rows in curated.chosen.tables(PREFERENCE):
            pairs.write(split, rows)


def _plain(row: DatasetExample) -> dict[str, Any]:
    return {**asdict(replace(row, history=())), "history": [turn.model_dump() for turn in row.history]}


def _alpaca_lines(rows: "pa.Table", system_prompt: str) -> Iterator[str]:
    for row in rows.to_pylist():
        yield json.dumps(alpaca(_row(row), system_prompt), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class DatasetContent:
    """What a written dataset holds, for the checks of the asset curated_dataset.

    Attributes:
        examples: examples of prompt_completion/ without replay, of both splits.
        undesirable: undesirable answers of unpaired_preference/, of both splits.
        near_benchmark: prompts that overlap with the benchmark, each once.
        invalid_targets: `prompt: problem` of each answer to train on that does not pass the output schema.
    """

    examples: int
    undesirable: int
    near_benchmark: tuple[str, ...]
    invalid_targets: tuple[str, ...]


def inspect_dataset(folder: Path, policy: Policy) -> DatasetContent:
    """Read every row of a written dataset once and apply the policy to it again.

    Curation should have left out whatever is found here; the checks read the files so that they do not rely on that.

    Raises:
        CurationError: an earlier version of the project wrote the dataset.
    """
    examples = undesirable = 0
    near: list[str] = []
    invalid: list[str] = []
    seen_prompts: set[int] = set()  # hashes, since there may be millions of rows
    seen_answers: set[int] = set()
    for row in read_all(folder):
        examples += row.get("source", REPLAY) != REPLAY
        undesirable += row.get("label") is False
        prompt, history = row["prompt"], turns_of(row)
        if (key := hash((prompt, history))) not in seen_prompts:
            seen_prompts.add(key)
            if near_benchmark(prompt, history, policy):
                near.append(prompt)
        if row.get("label") is False:
            continue
        answer = row["chosen"] if "chosen" in row else row["completion"]
        if (key := hash((prompt, answer))) not in seen_answers:
            seen_answers.add(key)
            if (problem := policy.problem(answer)) is not None:
                invalid.append(f"{prompt}: {problem}")
    return DatasetContent(examples, undesirable, tuple(near), tuple(invalid))


def _replayed(
    replay: Sequence[DatasetExample], asks: Callable[[str], bool], count: int, policy: Policy
) -> tuple[list[DatasetExample], Counter[str]]:
    """The rows to mix in, and what was redacted in them.

    Args:
        asks: whether the dataset asks a question already.
        count: how many, if there are so many that neither the dataset nor the benchmark asks, and that do not belong
            to the validation set: who logs such a question later would find it there.
    """
    found: Counter[str] = Counter()
    chosen: list[DatasetExample] = []
    for original in sorted(replay, key=lambda row: hash_of(row.prompt)):
        if len(chosen) == count:
            break
        prompt, completion = redact(original.prompt), redact(original.completion)
        row = replace(original, prompt=prompt.text, completion=completion.text)
        if in_validation(row.conversation, policy.settings.validation_fraction) or asks(row.conversation):
            continue
        if near_benchmark(row.prompt, row.history, policy):
            continue
        found.update(prompt.counts)
        found.update(completion.counts)
        chosen.append(row)
    return chosen, found
