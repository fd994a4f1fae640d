"""Which of the examples that may train do: one a question, one of near-duplicates, as many of a source as it may give.

Works on what the first pass found, without a text but those of near-duplicates. Every choice goes by a total order, so
the same examples in any order give the same result. Loads numpy and pyarrow.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_pipeline.curation.acceptance import CONFLICT
from finetune_pipeline.curation.near_duplicates import BANDS, BITS, Sketches, components
from finetune_pipeline.curation.quotas import Quota, allowed
from finetune_pipeline.settings import LOGS, CurationSettings

if TYPE_CHECKING:
    import pyarrow as pa

DUPLICATE = "duplicate of another example"
NEAR_DUPLICATE = "near-duplicate of another example"
SAME_MEANING = "means the same as another example"
NAMED_CONFLICTS = 20

Numbers = np.ndarray[Any, Any]
Texts = Callable[[Numbers], Sequence[str]]
"""Gives the questions of these places in their normalised form."""


@dataclass(frozen=True)
class Choice:
    """Places of rows in the snapshot, each list in the order of the questions' hashes, and what was left out.

    Attributes:
        kept: answers to learn.
        pairs: corrections beside whose answer the model's own is shown; their questions are among those kept.
        undesirable: answers found bad.
        overlaps: rows that are near a question of the benchmark, or contain one.
        conflicts: pairs of a kept row and the most trusted one of another answer to its question, the first ones.
    """

    kept: Numbers
    pairs: Numbers
    undesirable: Numbers
    overlaps: Numbers
    conflicts: tuple[tuple[int, int], ...]
    left_out: dict[str, int]
    redacted: dict[str, int]


class Found:
    """The columns of what the first pass found, of rows that no later part supersedes."""

    def __init__(self, tables: "Sequence[pa.Table]", superseded: Numbers) -> None:
        import pyarrow as pa

        self._table = pa.concat_tables(tables)
        self.stands = ~superseded

    def places(self, column: str) -> Numbers:
        """Rows of which this is true."""
        return np.flatnonzero(self._table[column].to_numpy() & self.stands)

    def of(self, column: str, places: Numbers) -> Numbers:
        """The numbers of a column at these places."""
        return np.asarray(self._table[column].to_numpy()[places])

    def texts(self, column: str, places: Numbers) -> "pa.ChunkedArray":
        """The texts of a column at these places."""
        import pyarrow as pa

        return self._table[column].take(pa.array(places))

    def left_out(self) -> Counter[str]:
        """Why how many rows were refused."""
        reasons = self._table["reason"].filter(self.stands).drop_null().value_counts().to_pylist()
        return Counter({one["values"]: one["counts"] for one in reasons})

    def sketches(self, places: Numbers) -> Sketches:
        """The sketches of these rows."""

        def matrix(column: str, kind: type[Any], width: int) -> Numbers:
            chunks = [_bytes(chunk) for chunk in self._table[column].chunks if len(chunk)]
            whole = np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)
            return np.asarray(whole.view(kind).reshape(-1, width)[places])

        bands, bits = matrix("bands", np.uint32, BANDS), matrix("bits", np.uint64, BITS // 64)
        return Sketches(bands, bits, self.of("size", places), self.of("target", places))


def _bytes(chunk: "pa.FixedSizeBinaryArray") -> Numbers:
    width = chunk.type.byte_width
    return np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]


def choose(found: Found, settings: CurationSettings, quotas: Mapping[str, Quota], texts: Texts) -> Choice:
    """Choose among the accepted rows, and among those that show what not to answer."""
    left_out = found.left_out()
    accepted = found.places("accepted")
    accepted = accepted[_by_trust(found, accepted)]
    best, conflicts = _one_a_question(found, accepted, left_out)
    one = best[_first_of(_near(found, best, settings, texts))]
    left_out[NEAR_DUPLICATE] += len(best) - len(one)
    if settings.semantic:
        from finetune_pipeline.curation.meaning import alike

        rest = one[_first_of(alike(texts(one), found.of("target", one), settings.semantic_similarity))]
        left_out[SAME_MEANING] += len(one) - len(rest)
        one = rest
    within = _within_quotas(found, one, quotas)
    kept = _by_question(found, one[within])
    for name, count in Counter(_sources(found, one[~within])).items():
        left_out[f"over the quota of {name}"] += count
    return Choice(
        kept=kept,
        pairs=_pairs(found, accepted, kept),
        undesirable=_undesirable(found, accepted, best, kept, quotas),
        overlaps=found.places("overlap"),
        conflicts=conflicts,
        left_out={reason: count for reason, count in sorted(left_out.items()) if count},
        redacted=_redacted(found, kept),
    )


def _by_trust(found: Found, places: Numbers) -> Numbers:
    """An order: what a reviewer decided before another person's before a validator's, reward, newest, hash."""
    keys = [found.of(column, places) for column in ("tie", "target", "ingest_offset", "reward", "person", "reviewed")]
    return np.lexsort(keys)[::-1]


def _one_a_question(
    found: Found, accepted: Numbers, left_out: Counter[str]
) -> tuple[Numbers, tuple[tuple[int, int], ...]]:
    """The most trusted row of each question, the most trusted first, and who it disagrees with."""
    question, target = found.of("question", accepted), found.of("target", accepted)
    order = np.argsort(question, kind="stable")
    first = _starts(question[order])
    best = np.repeat(order[first], np.diff(np.append(np.flatnonzero(first), len(order))))
    differs = target[order] != target[best]
    left_out[CONFLICT] += int(differs.sum())
    left_out[DUPLICATE] += int((~first & ~differs).sum())
    pairs = zip(accepted[best[differs]].tolist(), accepted[order[differs]].tolist(), strict=True)
    named: dict[int, int] = {}
    for kept, other in pairs:  # of each question the most trusted answer that differs
        if kept not in named and len(named) == NAMED_CONFLICTS:
            break
        named.setdefault(kept, other)
    return accepted[np.sort(order[first])], tuple(named.items())


def _starts(values: Numbers) -> Numbers:
    """Where a run of equal values begins."""
    return np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.zeros(0, np.bool_)


def _first_of(labels: Numbers) -> Numbers:
    """The first place of each label, in the order of places."""
    return np.sort(np.unique(labels, return_index=True)[1])


def _near(found: Found, best: Numbers, settings: CurationSettings, texts: Texts) -> Numbers:
    """A label for each row, the same for near-duplicates with the same answer."""
    if settings.near_similarity is None:
        return np.arange(len(best))
    order = np.argsort(found.of("question", best), kind="stable")
    ordered = best[order]
    labels = np.empty(len(best), np.int64)
    labels[order] = components(found.sketches(ordered), settings.near_similarity, lambda places: texts(ordered[places]))
    return labels


def _within_quotas(found: Found, places: Numbers, quotas: Mapping[str, Quota]) -> Numbers:
    """Which of the rows stay: the first ones of each source as far as its quota goes."""
    sources = found.texts("source", places).fill_null(LOGS).combine_chunks().dictionary_encode()
    names, numbers = sources.dictionary.to_pylist(), sources.indices.to_numpy()
    may = allowed({name: int((numbers == n).sum()) for n, name in enumerate(names)}, quotas)
    within = np.zeros(len(places), np.bool_)
    for number, name in enumerate(names):
        within[np.flatnonzero(numbers == number)[: may[name]]] = True
    return within


def _sources(found: Found, places: Numbers) -> list[str]:
    return list(found.texts("source", places).fill_null(LOGS).to_pylist())


def _by_question(found: Found, places: Numbers) -> Numbers:
    return places[np.argsort(found.of("question", places), kind="stable")]


def _pairs(found: Found, accepted: Numbers, kept: Numbers) -> Numbers:
    """At most one row a question: the most trusted correction whose answer is the one to learn."""
    faults = accepted[found.of("fault", accepted)]
    question, target = found.of("question", faults), found.of("target", faults)
    learnt, same = _targets(found, kept, question)
    return _by_question(found, _first_of_question(found, faults[learnt & (target == same)]))


def _undesirable(found: Found, accepted: Numbers, best: Numbers, kept: Numbers, quotas: Mapping[str, Quota]) -> Numbers:
    """At most one row a question: what a person corrected first, then the worst rewarded, then the newest.

    An answer that the training set teaches is never a bad one: nor one that it would teach, were there not a
    near-duplicate of the question that does. Those of a source take what its answers to learn left of its quota; a
    correction that is learnt is one example, with what it corrected.
    """
    shown = np.concatenate([accepted[found.of("fault", accepted)], found.places("bad")])
    keys = [found.of(column, shown) for column in ("tie", "output", "ingest_offset")]
    shown = shown[np.lexsort([*keys, -found.of("reward", shown), found.of("corrected", shown)])[::-1]]
    learnt, same = _targets(found, _by_question(found, best), found.of("question", shown))
    wrong = ~learnt | (found.of("output", shown) != same)
    shown = _first_of_question(found, shown[wrong])
    of_kept = np.isin(shown, kept)
    others = shown[~of_kept]
    within = _within_quotas(found, np.concatenate([kept, others]), quotas)[len(kept) :]
    return _by_question(found, np.concatenate([shown[of_kept], others[within]]))


def _targets(found: Found, places: Numbers, questions: Numbers) -> tuple[Numbers, Numbers]:
    """Whether each question is asked by one of these rows (in the order of questions), and that row's answer."""
    known, targets = found.of("question", places), found.of("target", places)
    if not len(known):
        return np.zeros(len(questions), np.bool_), np.zeros(len(questions), np.uint64)
    at = np.minimum(np.searchsorted(known, questions), len(known) - 1)
    return known[at] == questions, targets[at]


def _first_of_question(found: Found, places: Numbers) -> Numbers:
    return places[_first_of(found.of("question", places))]


def _redacted(found: Found, places: Numbers) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for text in found.texts("redacted", places).drop_null().to_pylist():
        counts.update(json.loads(text))
    return dict(sorted(counts.items()))
