"""From examples to a training set: redact, decide, deduplicate, split, mix in what must not be forgotten, write."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.formats import alpaca
from finetune_pipeline.curation.preferences import (
    LABELLED,
    LABELLED_COLUMNS,
    PAIR_COLUMNS,
    PAIRS,
    Labelled,
    Pair,
    pairs,
    undesirable,
)
from finetune_pipeline.curation.quotas import allowed
from finetune_pipeline.curation.redaction import RedactedExample, redact, redact_example
from finetune_pipeline.curation.rules import NEAR_BENCHMARK, Policy, accept, at_a_glance, found_bad, near_benchmark
from finetune_pipeline.curation.storage import read_split, save_splits
from finetune_pipeline.records import Example, Turn, conversation, normalise, text_hash
from finetune_pipeline.settings import LOGS

DUPLICATE = "duplicate of another example"
CONFLICT = "same prompt, less trusted answer"
DATASET = "dataset"
COLUMNS = {
    "prompt": "string", "history": "turns", "completion": "string", "reward": "float64", "source": "string",
    "origin": "string", "interaction_id": "string", "content_hash": "string",
}  # fmt: skip
SPLITS = ("train", "validation")

R = TypeVar("R", "Row", Pair, Labelled)

Identity = Callable[[Example], str]
"""The content hash of an example: by it the store knows the example again after it was judged."""


class CurationError(RuntimeError):
    """A file that curation needs is missing or not of its form; the message says which, and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of the dataset."""

    prompt: str
    completion: str
    reward: float
    source: str
    origin: str | None = None
    interaction_id: str | None = None
    history: tuple[Turn, ...] = ()
    content_hash: str | None = None

    @property
    def question(self) -> str:
        """The prompt with what was said before it."""
        return conversation(self.prompt, self.history)


@dataclass(frozen=True)
class _Candidate:
    redacted: RedactedExample
    content_hash: str  # of the example before its redaction

    @property
    def example(self) -> Example:
        return self.redacted.example

    @property
    def question(self) -> str:
        return conversation(self.example.prompt, self.example.history)


@dataclass(frozen=True)
class Curated:
    """A dataset before it is written, with what was left out and why.

    Attributes:
        train, validation: answers to learn, and of `train` the last `replayed` are replayed ones.
        pairs: corrected answers beside the model's own, by split.
        undesirable: answers found bad, by split.
        left_out: why how many examples are not in train or validation.
        redacted: kind of secret or personal data -> places where it was replaced.
        near_benchmark: interaction ids taken out as near-duplicates of the benchmark.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    pairs: Mapping[str, tuple[Pair, ...]]
    undesirable: Mapping[str, tuple[Labelled, ...]]
    replayed: int
    left_out: dict[str, int]
    redacted: dict[str, int]
    near_benchmark: tuple[str, ...]

    @property
    def sources(self) -> dict[str, int]:
        """Source -> examples of train and validation."""
        return dict(sorted(Counter(row.source for row in (*self.train, *self.validation)).items()))

    @property
    def examples(self) -> int:
        """Examples from use: train and validation without the replayed ones."""
        return len(self.train) + len(self.validation) - self.replayed


def curate(examples: Iterable[Example], replay: Sequence[Row], policy: Policy, identity: Identity) -> Curated:
    """Build the dataset, with secrets and personal data replaced; the same examples in any order give the same one."""
    sifted = _sift(examples, policy, identity)
    left_out = sifted.left_out
    unique = _within_quotas(_deduplicate(sifted.accepted, left_out), policy, left_out)
    rows = [_row(candidate) for candidate in unique]
    learnt = _by_split(rows, policy)
    mixed_in, found = _replayed(replay, rows, round(policy.settings.replay_ratio * len(learnt["train"])), policy)
    for candidate in unique:
        found.update(candidate.redacted.counts)
    targets = {text_hash(row.question): row.completion for row in rows}
    accepted = [candidate.example for candidate in sifted.accepted]
    longest = policy.settings.max_answer_chars
    return Curated(
        train=(*learnt["train"], *mixed_in),
        validation=learnt["validation"],
        pairs=_by_split(pairs(accepted, targets, longest), policy),
        undesirable=_by_split(undesirable(accepted, sifted.bad, targets, longest), policy),
        replayed=len(mixed_in),
        left_out=dict(sorted(left_out.items())),
        redacted=dict(sorted(found.items())),
        near_benchmark=tuple(sorted(sifted.near_benchmark)),
    )


@dataclass(frozen=True)
class _Sifted:
    """Examples by what the rules say of each one alone; the accepted ones with the most trusted first."""

    accepted: list[_Candidate]
    bad: list[Example]
    left_out: Counter[str]
    near_benchmark: list[str]


def _sift(examples: Iterable[Example], policy: Policy, identity: Identity) -> _Sifted:
    sifted = _Sifted([], [], Counter(), [])
    for original in examples:
        decision = at_a_glance(original, policy)
        if decision.accepted:
            redacted = redact_example(original)
            decision = accept(redacted.example, policy)
            if decision.accepted:
                sifted.accepted.append(_Candidate(redacted, identity(original)))
                continue
        sifted.left_out[decision.reason] += 1
        near = decision.reason == NEAR_BENCHMARK
        if found_bad(original, policy):
            example = redact_example(original).example
            near = near_benchmark(example.prompt, example.history, policy)
            if not near:
                sifted.bad.append(example)
        if near:
            sifted.near_benchmark.append(str(original.interaction_id))
    sifted.accepted.sort(key=_trust, reverse=True)
    return sifted


def _by_split(rows: Iterable[R], policy: Policy) -> dict[str, tuple[R, ...]]:
    """The rows that train and those that validate, in their order."""
    split: dict[str, list[R]] = {name: [] for name in SPLITS}
    for row in rows:
        split[SPLITS[in_validation(row.question, policy.settings.validation_share)]].append(row)
    return {name: tuple(found) for name, found in split.items()}


def in_validation(question: str, share: float) -> bool:
    """Whether a question belongs to the validation set: fixed by its hash, so it never moves between cycles."""
    number = int(hashlib.sha256(f"split:{normalise(question)}".encode()).hexdigest()[:8], 16)
    return number / 16**8 < share


def read_replay(path: Path) -> list[Row]:
    """Read a JSONL of prompt and completion.

    Raises:
        CurationError: the file is missing, or a line is not of this form.
    """
    if not path.is_file():
        raise CurationError(f"curation.replay: {path} is not there; correct the path in the loop's YAML, or remove it")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            document = json.loads(line)
            rows.append(Row(str(document["prompt"]), str(document["completion"]), 1.0, "replay"))
        except (ValueError, KeyError, TypeError) as error:
            raise CurationError(
                f'{path}:{number}: expected {{"prompt": ..., "completion": ...}}, found {line[:80]!r} ({error!r})'
            ) from error
    return rows


def write_dataset(curated: Curated, folder: Path, system_prompt: str) -> None:
    """Write three Hugging Face datasets of the splits train and validation, and the first for Alpaca-style tools too.

    `dataset/` has the answers to learn (`train.alpaca.jsonl` and `validation.alpaca.jsonl` the same), `pairs/` the
    corrections with what the model had said, `labelled/` the answers found good (those of `dataset/`) and found bad.
    """
    rows = {"train": curated.train, "validation": curated.validation}
    save_splits(folder / DATASET, rows, COLUMNS)
    save_splits(folder / PAIRS, curated.pairs, PAIR_COLUMNS)
    labelled = {name: [*map(_desirable, rows[name]), *curated.undesirable[name]] for name in SPLITS}
    save_splits(folder / LABELLED, labelled, LABELLED_COLUMNS)
    for name in SPLITS:
        lines = [json.dumps(alpaca(row, system_prompt), ensure_ascii=False) for row in rows[name]]
        (folder / f"{name}.alpaca.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
            yield from (row for split in SPLITS for row in read_split(folder / name, split))


def overlaps(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Prompts among these rows, each named once, that are near a benchmark question."""
    asked = dict.fromkeys((row["prompt"], turns(row)) for row in rows)
    return [prompt for prompt, history in asked if near_benchmark(prompt, history, policy)]


def turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    """What was said before the prompt of a row that was read."""
    return tuple(Turn.model_validate(turn) for turn in row["history"])


def invalid_targets(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Answers to learn that do not pass the output schema: the prompt, and what is wrong."""
    learnt = [row for row in rows if row.get("label") is not False]
    answers = dict.fromkeys((row["prompt"], row["chosen"] if "chosen" in row else row["completion"]) for row in learnt)
    problems = ((prompt, policy.problem(answer)) for prompt, answer in answers)
    return [f"{prompt}: {problem}" for prompt, problem in problems if problem is not None]


def _trust(candidate: _Candidate) -> tuple[bool, bool, float, int]:
    """A reviewer's answer before another person's before a validator's, then the better rewarded, then the newest."""
    example = candidate.example
    person = example.corrected or example.confirmed
    return example.review is not None, person, example.reward, example.sequence


def _deduplicate(candidates: Sequence[_Candidate], left_out: Counter[str]) -> list[_Candidate]:
    """One example a question, the first of the candidates."""
    best: dict[str, _Candidate] = {}
    for candidate in candidates:
        kept = best.setdefault(text_hash(candidate.question), candidate)
        if kept is not candidate:
            same = kept.example.target.strip() == candidate.example.target.strip()
            left_out[DUPLICATE if same else CONFLICT] += 1
    return [best[key] for key in sorted(best)]


def _within_quotas(candidates: Sequence[_Candidate], policy: Policy, left_out: Counter[str]) -> list[_Candidate]:
    """The candidates, of each source the most trusted ones as far as its quota goes."""
    of_source: dict[str, list[_Candidate]] = {}
    for candidate in sorted(candidates, key=_trust, reverse=True):
        of_source.setdefault(_source(candidate), []).append(candidate)
    may = allowed({source: len(found) for source, found in of_source.items()}, policy.quotas)
    for source, found in of_source.items():
        if len(found) > may[source]:
            left_out[f"over the quota of {source}"] += len(found) - may[source]
    kept = {id(candidate) for source, found in of_source.items() for candidate in found[: may[source]]}
    return [candidate for candidate in candidates if id(candidate) in kept]


def _source(candidate: _Candidate) -> str:
    return candidate.example.source or LOGS


def _row(candidate: _Candidate) -> Row:
    example = candidate.example
    return Row(
        prompt=example.prompt,
        completion=example.target,
        reward=example.reward,
        source=_source(candidate),
        origin=example.origin,
        interaction_id=str(example.interaction_id),
        history=example.history,
        content_hash=candidate.content_hash,
    )


def _replayed(replay: Sequence[Row], rows: Sequence[Row], count: int, policy: Policy) -> tuple[list[Row], Counter[str]]:
    """The rows to mix in, and what was redacted in them."""
    taken = {text_hash(row.question) for row in rows}
    free = [
        row
        for row in replay
        if text_hash(row.question) not in taken and not near_benchmark(row.prompt, row.history, policy)
    ]
    found: Counter[str] = Counter()
    chosen = []
    for row in sorted(free, key=lambda row: hash_of(row.prompt))[:count]:
        prompt, completion = redact(row.prompt), redact(row.completion)
        found.update(prompt.counts)
        found.update(completion.counts)
        chosen.append(replace(row, prompt=prompt.text, completion=completion.text))
    return chosen, found


def _desirable(row: Row) -> Labelled:
    return Labelled(row.prompt, row.history, row.completion, True, row.interaction_id)
