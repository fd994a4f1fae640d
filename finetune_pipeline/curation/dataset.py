"""From examples to a training set: decide, deduplicate, split, mix in what must not be forgotten, write."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.curation.rules import NEAR_BENCHMARK, Policy, accept, near_benchmark
from finetune_pipeline.records import Example, normalise, text_hash

DUPLICATE = "duplicate of another example"
CONFLICT = "same prompt, less trusted answer"
COLUMNS = ("prompt", "completion", "reward", "source", "interaction_id")


class CurationError(RuntimeError):
    """A file that curation needs is missing or not of its form; the message says which, and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of the dataset."""

    prompt: str
    completion: str
    reward: float
    source: str
    interaction_id: str | None


@dataclass(frozen=True)
class Curated:
    """A dataset before it is written, with what was left out and why."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    replayed: int
    left_out: dict[str, int]
    near_benchmark: tuple[str, ...]

    @property
    def examples(self) -> int:
        """Examples from use: train and validation without the replayed ones."""
        return len(self.train) + len(self.validation) - self.replayed


def curate(examples: Iterable[Example], replay: Sequence[Row], policy: Policy) -> Curated:
    """Build the dataset; the same examples in any order give the same one."""
    left_out: Counter[str] = Counter()
    near: list[str] = []
    accepted: list[Example] = []
    for example in examples:
        decision = accept(example, policy)
        if decision.accepted:
            accepted.append(example)
            continue
        left_out[decision.reason] += 1
        if decision.reason == NEAR_BENCHMARK:
            near.append(str(example.interaction_id))
    unique = _deduplicate(accepted, left_out)
    rows = [_row(example) for example in unique]
    train = [row for row in rows if not in_validation(row.prompt, policy.settings.validation_share)]
    validation = [row for row in rows if in_validation(row.prompt, policy.settings.validation_share)]
    mixed_in = _replayed(replay, rows, round(policy.settings.replay_ratio * len(train)), policy)
    return Curated(
        (*train, *mixed_in), tuple(validation), len(mixed_in), dict(sorted(left_out.items())), tuple(sorted(near))
    )


def in_validation(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the validation set: fixed by its hash, so it never moves between cycles."""
    number = int(hashlib.sha256(f"split:{normalise(prompt)}".encode()).hexdigest()[:8], 16)
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
            rows.append(Row(str(document["prompt"]), str(document["completion"]), 1.0, "replay", None))
        except (ValueError, KeyError, TypeError) as error:
            raise CurationError(
                f'{path}:{number}: expected {{"prompt": ..., "completion": ...}}, found {line[:80]!r} ({error!r})'
            ) from error
    return rows


def write_dataset(curated: Curated, folder: Path, system_prompt: str) -> None:
    """Write the Hugging Face dataset (`dataset/`, splits train and validation) and `train.alpaca.jsonl`."""
    import datasets

    features = datasets.Features(
        {name: datasets.Value("float64" if name == "reward" else "string") for name in COLUMNS}
    )
    splits = {"train": curated.train, "validation": curated.validation}
    datasets.disable_progress_bars()
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({c: [getattr(row, c) for row in rows] for c in COLUMNS}, features)
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
    return [row["prompt"] for row in rows if near_benchmark(row["prompt"], policy)]


def invalid_targets(rows: Iterable[dict[str, Any]], policy: Policy) -> list[str]:
    """Rows whose answer does not pass the output schema: the prompt, and what is wrong."""
    problems = ((row["prompt"], policy.problem(row["completion"])) for row in rows)
    return [f"{prompt}: {problem}" for prompt, problem in problems if problem is not None]


def _deduplicate(examples: Sequence[Example], left_out: Counter[str]) -> list[Example]:
    """One example a prompt: a person's answer before a validator's, then the better rewarded, then the newest."""
    best: dict[str, Example] = {}
    for example in sorted(examples, key=lambda x: (x.corrected or x.confirmed, x.reward, x.sequence), reverse=True):
        kept = best.setdefault(text_hash(example.prompt), example)
        if kept is not example:
            left_out[DUPLICATE if kept.target.strip() == example.target.strip() else CONFLICT] += 1
    return [best[key] for key in sorted(best)]


def _row(example: Example) -> Row:
    return Row(example.prompt, example.target, example.reward, "feedback", str(example.interaction_id))


def _replayed(replay: Sequence[Row], rows: Sequence[Row], count: int, policy: Policy) -> list[Row]:
    taken = {text_hash(row.prompt) for row in rows}
    free = [row for row in replay if text_hash(row.prompt) not in taken and not near_benchmark(row.prompt, policy)]
    return sorted(free, key=lambda row: hash_of(row.prompt))[:count]


def _alpaca(row: Row, system_prompt: str) -> dict[str, str]:
    return {"instruction": system_prompt, "input": row.prompt, "output": row.completion}
