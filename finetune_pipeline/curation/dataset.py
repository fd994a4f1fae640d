"""From examples to a training set: redact, decide, deduplicate, split, mix in what must not be forgotten, write."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.redaction import RedactedExample, redact, redact_example
from finetune_pipeline.curation.rules import NEAR_BENCHMARK, Policy, accept, at_a_glance, near_benchmark
from finetune_pipeline.records import Example, Turn, conversation, normalise, text_hash

DUPLICATE = "duplicate of another example"
CONFLICT = "same prompt, less trusted answer"
COLUMNS = ("prompt", "history", "completion", "reward", "source", "interaction_id", "content_hash")

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
    """A dataset before it is written, with what was left out and why."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    replayed: int
    left_out: dict[str, int]
    redacted: dict[str, int]
    near_benchmark: tuple[str, ...]

    @property
    def examples(self) -> int:
        """Examples from use: train and validation without the replayed ones."""
        return len(self.train) + len(self.validation) - self.replayed


def curate(examples: Iterable[Example], replay: Sequence[Row], policy: Policy, identity: Identity) -> Curated:
    """Build the dataset, with secrets and personal data replaced; the same examples in any order give the same one."""
    left_out: Counter[str] = Counter()
    near: list[str] = []
    accepted: list[_Candidate] = []
    for original in examples:
        decision = at_a_glance(original, policy)
        if decision.accepted:
            redacted = redact_example(original)
            decision = accept(redacted.example, policy)
        if decision.accepted:
            accepted.append(_Candidate(redacted, identity(original)))
            continue
        left_out[decision.reason] += 1
        if decision.reason == NEAR_BENCHMARK:
            near.append(str(original.interaction_id))
    unique = _deduplicate(accepted, left_out)
    rows = [_row(candidate) for candidate in unique]
    train = [row for row in rows if not in_validation(row.question, policy.settings.validation_share)]
    validation = [row for row in rows if in_validation(row.question, policy.settings.validation_share)]
    mixed_in, found = _replayed(replay, rows, round(policy.settings.replay_ratio * len(train)), policy)
    for candidate in unique:
        found.update(candidate.redacted.counts)
    return Curated(
        train=(*train, *mixed_in),
        validation=tuple(validation),
        replayed=len(mixed_in),
        left_out=dict(sorted(left_out.items())),
        redacted=dict(sorted(found.items())),
        near_benchmark=tuple(sorted(near)),
    )


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
    """Write the Hugging Face dataset (`dataset/`, splits train and validation) and `train.alpaca.jsonl`."""
    import datasets

    text = datasets.Value("string")
    kinds = {"reward": datasets.Value("float64"), "history": [{"role": text, "content": text}]}
    features = datasets.Features({name: kinds.get(name, text) for name in COLUMNS})
    splits = {"train": curated.train, "validation": curated.validation}
    datasets.disable_progress_bars()
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({c: [_cell(row, c) for row in rows] for c in COLUMNS}, features)
            for name, rows in splits.items()
        }
    ).save_to_disk(folder / "dataset", num_shards=dict.fromkeys(splits, 1))  # an empty split has no shard by itself
    for name, rows in splits.items():
        lines = [json.dumps(_alpaca(row, system_prompt), ensure_ascii=False) for row in rows]
        (folder / f"{name}.alpaca.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a written dataset's split."""
    import datasets

    return list(datasets.load_from_disk(str(folder / "dataset"))[split])


def overlaps(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Prompts among these rows that are near a benchmark question."""
    return [row["prompt"] for row in rows if near_benchmark(row["prompt"], turns(row), policy)]


def turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    """What was said before the prompt of a row that was read."""
    return tuple(Turn.model_validate(turn) for turn in row["history"])


def invalid_targets(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Rows whose answer does not pass the output schema: the prompt, and what is wrong."""
    problems = ((row["prompt"], policy.problem(row["completion"])) for row in rows)
    return [f"{prompt}: {problem}" for prompt, problem in problems if problem is not None]


def _deduplicate(candidates: Sequence[_Candidate], left_out: Counter[str]) -> list[_Candidate]:
    """One example a question: a person's answer before a validator's, then the better rewarded, then the newest."""

    def trust(candidate: _Candidate) -> tuple[bool, float, int]:
        example = candidate.example
        return example.corrected or example.confirmed, example.reward, example.sequence

    best: dict[str, _Candidate] = {}
    for candidate in sorted(candidates, key=trust, reverse=True):
        kept = best.setdefault(text_hash(candidate.question), candidate)
        if kept is not candidate:
            same = kept.example.target.strip() == candidate.example.target.strip()
            left_out[DUPLICATE if same else CONFLICT] += 1
    return [best[key] for key in sorted(best)]


def _row(candidate: _Candidate) -> Row:
    example = candidate.example
    return Row(
        prompt=example.prompt,
        completion=example.target,
        reward=example.reward,
        source="feedback",
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


def _cell(row: Row, column: str) -> Any:
    value = getattr(row, column)
    return [turn.model_dump() for turn in value] if column == "history" else value


def _alpaca(row: Row, system_prompt: str) -> dict[str, Any]:
    """A line as Alpaca-style tools read it; a system message of the conversation stands instead of the loop's own."""
    line = {"instruction": system_prompt, "input": row.prompt, "output": row.completion}
    if not row.history:
        return line
    own = row.history[0].role == "system"
    said = row.history[1:] if own else row.history
    return {
        **line,
        "instruction": row.history[0].content if own else system_prompt,
        "history": [list(pair) for pair in _pairs(said)],
    }


def _pairs(said: Iterable[Turn]) -> Iterator[tuple[str, str]]:
    """What was asked and what was answered, in turn; messages of one side in a row are one message."""
    asked: list[str] = []
    answered: list[str] = []
    for turn in said:
        if turn.role == "assistant":
            answered.append(turn.content)
            continue
        if answered:
            yield "\n".join(asked), "\n".join(answered)
            asked, answered = [], []
        asked.append(turn.content)
    if asked or answered:
        yield "\n".join(asked), "\n".join(answered)
