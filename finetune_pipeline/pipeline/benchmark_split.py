"""Split prompts into benchmark questions and training rows, so that near-duplicates stay on one side.

Prompts are grouped by MinHash, as curation finds near-duplicates. The smallest groups become questions first, in equal
fractions of every slice: a group in the benchmark is lost to training, and its questions say much the same.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from finetune_pipeline.curation.deduplication import near_duplicates, sketch
from finetune_pipeline.curation.filter import answer_hash

FRACTION = 0.25
"""Fraction of the prompts that become questions."""

ADVISABLE = 40
"""Questions below which a comparison says little; more than a quarter of few prompts, but never more than half."""

MOST = 500
"""Questions of a large set of prompts: the standard error of their accuracy is at most 2.2 points."""


def question_count(prompts: int) -> int:
    """Return how many of these prompts become questions."""
    return min(MOST, max(round(FRACTION * prompts), min(ADVISABLE, prompts // 2)))


def choose_questions(prompts: Sequence[str], slices: Mapping[int, str], similarity: float, seed: int = 0) -> list[int]:
    """Return the indices of the prompts that become questions, in the order of the prompts.

    Args:
        prompts: normalized by `records.normalize`, each once.
        slices: index of a prompt that can be a question -> its slice.
        similarity: Jaccard similarity from which two prompts are near-duplicates.
        seed: chooses among groups of one size.
    """
    count = question_count(len(slices))
    quotas = _quotas(Counter(slices.values()), count)
    groups = _groups(prompts, similarity, seed)
    chosen: set[int] = set()

    def take(indices: Sequence[int]) -> None:
        chosen.update(indices)
        quotas.subtract(slices[index] for index in indices)

    whole = [group for group in groups if all(index in slices for index in group)]
    for fraction in (1.0, 0.75):  # of a group that may go to slices with too few questions yet
        for group in whole:
            wanted = Counter(slices[index] for index in group)
            missing = sum(min(number, max(0, quotas[name])) for name, number in wanted.items())
            fits = len(chosen) + len(group) <= count and missing >= fraction * len(group)
            if fits and group[0] not in chosen:
                take(group)
    # Of large groups, single prompts. Their near-duplicates cannot train.
    rest = [index for group in groups for index in group if index in slices and index not in chosen]
    for index in rest:
        if len(chosen) < count and quotas[slices[index]] > 0:
            take([index])
    chosen.update([index for index in rest if index not in chosen][: max(0, count - len(chosen))])
    return sorted(chosen)


def count_distinct(prompts: Sequence[str], answers: Sequence[str], similarity: float) -> int:
    """Return how many examples curation would keep of these: of near-duplicates with the same answer, one.

    Args:
        prompts, similarity: as of `choose_questions`, but a prompt may occur again.
        answers: of each prompt.
    """
    return len({*_labels(prompts, [answer_hash(answer) for answer in answers], similarity)})


def _labels(prompts: Sequence[str], targets: Sequence[int], similarity: float) -> list[int]:
    sketches = sketch(prompts, np.array(targets, np.uint64))
    labels = near_duplicates(sketches, similarity, lambda indices: [prompts[index] for index in indices.tolist()])
    return [int(label) for label in labels]


def _groups(prompts: Sequence[str], similarity: float, seed: int) -> list[list[int]]:
    """Return the groups of near-duplicates, the smallest first, those of one size in a random order."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(_labels(prompts, [0] * len(prompts), similarity)):  # with any answer
        groups[label].append(index)
    order = [hashlib.sha256(f"{seed}:{prompt}".encode()).digest() for prompt in prompts]
    found = [sorted(group, key=order.__getitem__) for group in groups.values()]
    return sorted(found, key=lambda group: (len(group), order[group[0]]))


def _quotas(sizes: Counter[str], count: int) -> Counter[str]:
    """Return slice -> its number of questions: in proportion to its size, by the largest remainders."""
    exact = {name: count * size / sizes.total() for name, size in sorted(sizes.items())}
    quotas = Counter({name: math.floor(number) for name, number in exact.items()})
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    quotas.update(by_remainder[: count - quotas.total()])
    return quotas
