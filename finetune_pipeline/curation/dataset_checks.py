"""Inspect a written dataset, for the blocking checks of the asset curated_dataset."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.curation.acceptance import Policy, benchmark_overlap
from finetune_pipeline.curation.dataset_files import read_all, turns_of
from finetune_pipeline.settings import REPLAY


@dataclass(frozen=True)
class DatasetContent:
    """What a written dataset holds.

    Attributes:
        examples: examples of prompt_completion/ without replay, of both splits.
        undesirable: undesirable answers of unpaired_preference/, of both splits.
        near_benchmark: ids of the interactions whose prompts overlap with the benchmark, one of each prompt.
        invalid_targets: ids of the interactions whose answers to train on do not pass the output schema.
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
            if benchmark_overlap(prompt, history, policy):
                near.append(_name(row))
        if row.get("label") is False:
            continue
        answer = row["chosen"] if "chosen" in row else row["completion"]
        if (key := hash((prompt, answer))) not in seen_answers:
            seen_answers.add(key)
            if policy.problem(answer) is not None:
                invalid.append(_name(row))
    return DatasetContent(examples, undesirable, tuple(near), tuple(invalid))


def _name(row: Mapping[str, Any]) -> str:
    # Not by its text, which may be personal: Dagster stores what the checks find.
    return str(row.get("interaction_id") or "a row of the replay file")
