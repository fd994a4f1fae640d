"""The second step of curation: select among the accepted examples.

    one example for each prompt, the most trusted -> near-duplicates -> semantic duplicates -> quotas of sources
    then the preference pairs and the undesirable answers, which must not contradict what was selected

Works on the result of the filter, without texts except those of near-duplicates. Every choice follows a total order, so
the same examples in any order give the same result. Loads numpy.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_pipeline.curation.acceptance import CONFLICT, Quota
from finetune_pipeline.curation.deduplication import near_duplicates, semantic_duplicates
from finetune_pipeline.curation.filter import FilterResult
from finetune_pipeline.curation.snapshot import Array
from finetune_pipeline.settings import CurationSettings

DUPLICATE = "duplicate of another example"
NEAR_DUPLICATE = "near-duplicate of another example"
SEMANTIC_DUPLICATE = "semantic duplicate of another example"
CONFLICTS_NAMED = 20

Texts = Callable[[Array], Sequence[str]]
"""Returns the normalized prompts of the rows at these indices."""


@dataclass(frozen=True)
class Selection:
    """Row indices into the snapshot, sorted by the hashes of the prompts, and what was left out.

    Attributes:
        examples: rows to train or validate on.
        pairs: corrections whose rejected output makes a preference pair; their prompts are among those of `examples`.
        undesirable: rows whose output is an undesirable answer.
        near_benchmark: rows that overlap with the benchmark.
        conflicts: the first pairs of a selected row and the most trusted row with another answer to its prompt.
        left_out: reason -> rows.
        redacted: kind of secret or personal data -> replacements in `examples`.
    """

    examples: Array
    pairs: Array
    undesirable: Array
    near_benchmark: Array
    conflicts: tuple[tuple[int, int], ...]
    left_out: dict[str, int]
    redacted: dict[str, int]


def select(filtered: FilterResult, settings: CurationSettings, quotas: Mapping[str, Quota], texts: Texts) -> Selection:
    """Select the examples, preference pairs and undesirable answers of a dataset."""
    left_out = filtered.reasons()

    # Most trusted first: decided by a reviewer, by another person, by reward, newest; the hashes break ties.
    accepted = filtered.where("accepted")
    keys = ("id_hash", "target", "created_at", "reward", "by_person", "reviewed")
    accepted = accepted[np.lexsort([filtered.numbers(key, accepted) for key in keys])[::-1]]

    best, conflicts = _one_for_each_prompt(filtered, accepted, left_out)
    kept = best
    if settings.near_similarity is not None:
        # Sorted by prompt, so that the candidates of large buckets do not depend on the order of trust.
        order = np.argsort(filtered.numbers("prompt", kept), kind="stable")
        ordered = kept[order]
        labels = np.empty(len(kept), np.int64)
        labels[order] = near_duplicates(
            filtered.sketches(ordered), settings.near_similarity, lambda indices: texts(ordered[indices])
        )
        left_out[NEAR_DUPLICATE] += len(kept) - len(first := _first_of_each(labels))
        kept = kept[first]
    if settings.semantic:
        labels = semantic_duplicates(texts(kept), filtered.numbers("target", kept), settings.semantic_similarity)
        left_out[SEMANTIC_DUPLICATE] += len(kept) - len(first := _first_of_each(labels))
        kept = kept[first]
    within = _within_quotas(filtered, kept, quotas)
    names, codes = filtered.sources(kept[~within])
    for code, name in enumerate(names):
        left_out[f"over the quota of {name}"] += int((codes == code).sum())
    examples = _sort_by_prompt(filtered, kept[within])

    redacted: Counter[str] = Counter()
    for counts in filtered.texts("redacted", examples).drop_null().to_pylist():
        redacted.update(json.loads(counts))
    return Selection(
        examples=examples,
        pairs=_select_pairs(filtered, accepted, examples),
        undesirable=_select_undesirable(filtered, accepted, best, examples, quotas),
        near_benchmark=filtered.where("benchmark"),
        conflicts=conflicts,
        left_out={reason: count for reason, count in sorted(left_out.items()) if count},
        redacted=dict(sorted(redacted.items())),
    )


def _one_for_each_prompt(
    filtered: FilterResult, accepted: Array, left_out: Counter[str]
) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """Return the most trusted row of each prompt, most trusted first, and the first conflicts."""
    prompt, target = filtered.numbers("prompt", accepted), filtered.numbers("target", accepted)
    order = np.argsort(prompt, kind="stable")  # rows of a prompt stand together, the most trusted first
    first = np.concatenate([[True], prompt[order][1:] != prompt[order][:-1]]) if len(order) else np.zeros(0, np.bool_)
    best = np.repeat(order[first], np.diff(np.append(np.flatnonzero(first), len(order))))
    differs = target[order] != target[best]
    left_out[CONFLICT] += int(differs.sum())
    left_out[DUPLICATE] += int((~first & ~differs).sum())
    conflicts: dict[int, int] = {}  # kept row -> the most trusted row with another answer
    for kept, other in zip(accepted[best[differs]].tolist(), accepted[order[differs]].tolist(), strict=True):
        if kept not in conflicts and len(conflicts) == CONFLICTS_NAMED:
            break
        conflicts.setdefault(kept, other)
    return accepted[np.sort(order[first])], tuple(conflicts.items())


def _select_pairs(filtered: FilterResult, accepted: Array, examples: Array) -> Array:
    """Return the most trusted correction of each prompt whose answer is the one to train on."""
    corrections = accepted[filtered.numbers("rejected_output", accepted)]
    selected, target = _selected_targets(filtered, examples, filtered.numbers("prompt", corrections))
    corrections = corrections[selected & (filtered.numbers("target", corrections) == target)]
    return _sort_by_prompt(filtered, corrections[_first_of_each(filtered.numbers("prompt", corrections))])


def _select_undesirable(
    filtered: FilterResult, accepted: Array, best: Array, examples: Array, quotas: Mapping[str, Quota]
) -> Array:
    """Return one undesirable answer for each prompt: one that a person corrected, else the lowest reward, else newest.

    An answer to train on is never undesirable, nor is one that only a near-duplicate of the prompt has replaced. The
    quota of a source holds for examples and undesirable answers together; a correction counts once for both.
    """
    shown = np.concatenate([accepted[filtered.numbers("rejected_output", accepted)], filtered.where("undesirable")])
    keys = [filtered.numbers(key, shown) for key in ("id_hash", "output", "created_at")]
    shown = shown[np.lexsort([*keys, -filtered.numbers("reward", shown), filtered.numbers("corrected", shown)])[::-1]]
    asked, target = _selected_targets(filtered, _sort_by_prompt(filtered, best), filtered.numbers("prompt", shown))
    shown = shown[~asked | (filtered.numbers("output", shown) != target)]
    shown = shown[_first_of_each(filtered.numbers("prompt", shown))]
    of_examples = np.isin(shown, examples)
    others = shown[~of_examples]
    within = _within_quotas(filtered, np.concatenate([examples, others]), quotas)[len(examples) :]
    return _sort_by_prompt(filtered, np.concatenate([shown[of_examples], others[within]]))


def _selected_targets(filtered: FilterResult, selected: Array, prompts: Array) -> tuple[Array, Array]:
    """Return a mask of the prompts that `selected` (sorted by prompt) has, and its answer to each of them."""
    known, targets = filtered.numbers("prompt", selected), filtered.numbers("target", selected)
    if not len(known):
        return np.zeros(len(prompts), np.bool_), np.zeros(len(prompts), np.uint64)
    at = np.minimum(np.searchsorted(known, prompts), len(known) - 1)
    return known[at] == prompts, targets[at]


def _first_of_each(values: Array) -> Array:
    """Return the position of the first occurrence of each value, ascending."""
    return np.sort(np.unique(values, return_index=True)[1])


def _sort_by_prompt(filtered: FilterResult, indices: Array) -> Array:
    return indices[np.argsort(filtered.numbers("prompt", indices), kind="stable")]


def _within_quotas(filtered: FilterResult, indices: Array, quotas: Mapping[str, Quota]) -> Array:
    """Return a mask of the rows that the quotas allow: of each source the first ones."""
    names, codes = filtered.sources(indices)
    allowed = apply_quotas({name: int((codes == code).sum()) for code, name in enumerate(names)}, quotas)
    within = np.zeros(len(indices), np.bool_)
    for code, name in enumerate(names):
        within[np.flatnonzero(codes == code)[: allowed[name]]] = True
    return within


def apply_quotas(counts: Mapping[str, int], quotas: Mapping[str, Quota]) -> dict[str, int]:
    """Return how many of its examples each source may give to a dataset.

    `max_examples` caps a source by itself. `max_fraction` caps it relative to the size of the dataset, and that size is
    found so that the leading source keeps all its examples. The leading source is the one with the largest fraction (1
    without a quota) and, of those, the most examples. Every other source gets at most its fraction of the dataset. If
    the sources cannot fill the dataset, fractions act as proportions to the leading source. A source with fewer
    examples than it may give does not limit the others, and a source that has any examples gives at least one.

    So more examples of one source never mean fewer of another, except for the first examples of a new leading source.

    Args:
        counts: source -> examples.
        quotas: source -> its quota; other sources have none.
    """
    capped: dict[str, int] = {}
    for source, count in counts.items():
        most = quotas.get(source, Quota()).max_examples
        capped[source] = count if most is None else min(count, most)
    fractions = {source: quotas.get(source, Quota()).max_fraction for source, count in capped.items() if count}
    if not fractions:
        return capped
    # The size of the dataset by which fractions are measured. Start with everything and cut the sources that are over
    # their fraction, which makes the dataset smaller, until none is over it; but never so small that the leading source
    # would be cut.
    fraction, examples = max((fractions[source], capped[source]) for source in fractions)
    smallest = examples / fraction
    size = float(sum(capped.values()))
    while size > smallest:
        over = {source for source in fractions if capped[source] > fractions[source] * size}
        # The others stay whole and are the rest of the dataset: size = whole + size * (sum of the fractions over).
        whole = sum(count for source, count in capped.items() if source not in over)
        cut = whole / (1 - sum(fractions[source] for source in over))
        if cut >= size:
            break
        size = cut
    size = max(size, smallest)
    # 1e-9: in floating point, 0.2 * 5 may be less than 1.
    return {
        source: min(count, max(1, int(fractions[source] * size + 1e-9))) if count else 0
        for source, count in capped.items()
    }
