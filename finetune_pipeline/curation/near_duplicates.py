"""Questions that are nearly the same and have the same answer, among millions: sketches, candidates, exact check.

1. Each question gets a MinHash signature (Broder 1997) of its 5-character pieces, 128 permutations, cut into bands
   whose hashes are joined with the answer's (locality-sensitive hashing: Indyk and Motwani 1998). Questions that share
   a band are candidates; with 16 bands of 8, two of similarity 0.8 share one in 95 of 100 cases, of 0.9 always but once
   in 10,000.
2. A bitmap of the pieces refutes most candidates that are not similar enough, and none that are: bits in which two
   bitmaps differ are pieces in which the sets differ (the bitmap filter of Sandes, Teodoro and Melo 2020).
3. What is left is decided by the exact Jaccard similarity, so nothing is merged by chance.

Pairs join components. All of it is a function of the set of questions, whatever their order. Loads numpy and rensa.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from finetune_pipeline.curation.decontamination import SHINGLE, jaccard, shingles

PERMUTATIONS, BANDS, BITS = 128, 16, 512
_SEED = 1
_AT_ONCE = 256  # signatures come as Python's integers: of more at once, memory is fetched anew each time
_NEIGHBOURS = 32  # in a larger bucket each question is compared with so many after it
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sketches:
    """What is kept of each question.

    Attributes:
        bands: hash of each band and the answer, uint32 (questions, BANDS).
        bits: bitmap of the pieces, uint64 (questions, BITS / 64).
        sizes: number of pieces, counted each time they occur, uint32.
        answers: hash of the answer, uint64; that of a band alone would be the same by chance now and then.
    """

    bands: Numbers
    bits: Numbers
    sizes: Numbers
    answers: Numbers


def sketch(questions: Sequence[str], answers: Numbers) -> Sketches:
    """Sketch normalised questions.

    Args:
        questions: in the form of `records.normalize`.
        answers: a hash (uint64) of the answer of each.
    """
    from rensa import RMinHash

    if not questions:
        return Sketches(
            np.zeros((0, BANDS), np.uint32), np.zeros((0, BITS // 64), np.uint64), np.zeros(0, np.uint32), answers
        )
    pieces, offsets = _pieces(questions)
    rows = np.repeat(np.arange(len(questions)), np.diff(offsets))
    there = np.zeros((len(questions), BITS), np.bool_)
    there[rows, (pieces >> np.uint64(64 - 9)).astype(np.int64)] = True
    signatures = np.empty((len(questions), BANDS, PERMUTATIONS // BANDS), np.uint64)
    for start in range(0, len(questions), _AT_ONCE):
        bounds = offsets[start : start + _AT_ONCE + 1]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            pieces[bounds[0] : bounds[-1]], (bounds - bounds[0]).astype(np.uint64), PERMUTATIONS, _SEED
        )
        numbers = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint64, (len(bounds) - 1) * PERMUTATIONS)
        signatures[start : start + _AT_ONCE] = numbers.reshape(-1, *signatures.shape[1:])
    keys = np.broadcast_to(answers[:, None], (len(questions), BANDS))
    for column in range(signatures.shape[2]):
        keys = _mixed(keys * _MULTIPLIER + signatures[:, :, column])
    return Sketches(
        bands=(keys >> np.uint64(32)).astype(np.uint32),
        bits=np.packbits(there, axis=1).view(np.uint64),
        sizes=np.diff(offsets).astype(np.uint32),
        answers=answers,
    )


def _pieces(questions: Sequence[str]) -> tuple[Numbers, Numbers]:
    """The hash of every 5-character piece of all questions, and where each question's pieces begin (and the last end).

    A shorter question is filled up with NUL, which no question has: it is its own only piece.
    """
    filled = [question.ljust(SHINGLE, "\0") for question in questions]
    characters = np.frombuffer("".join(filled).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum([len(question) for question in filled])
    windows = len(characters) - SHINGLE + 1
    hashes = np.zeros(windows, np.uint64)
    for start in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + characters[start : start + windows]
    within = np.ones(windows, np.bool_)
    for back in range(1, SHINGLE):
        within[ends[:-1] - back] = False  # it would go over into the next question
    counts = np.diff(ends, prepend=0) - SHINGLE + 1
    return _mixed(hashes[within]), np.concatenate([[0], np.cumsum(counts)])


def _mixed(values: Numbers) -> Numbers:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def components(sketches: Sketches, similarity: float, texts: Callable[[Numbers], Sequence[str]]) -> Numbers:
    """A label for each question: those with the same label are near-duplicates of each other, directly or by others.

    Args:
        sketches: of questions in an order that is theirs, such as that of their hashes.
        similarity: Jaccard similarity from which two are near-duplicates.
        texts: gives the normalised questions of these places.
    """
    first, second = _candidates(sketches, similarity)
    places = np.unique(np.concatenate([first, second]))
    found = texts(places)

    @lru_cache(maxsize=512)  # pairs come in the order of their first question
    def pieces(number: int) -> frozenset[str]:
        return shingles(found[number])

    union = Union(len(sketches.sizes))
    numbers = zip(np.searchsorted(places, first).tolist(), np.searchsorted(places, second).tolist(), strict=True)
    for (one, other), (left, right) in zip(zip(first.tolist(), second.tolist(), strict=True), numbers, strict=True):
        if union.root(one) != union.root(other) and jaccard(pieces(left), pieces(right)) >= similarity:
            union.join(one, other)
    return union.labels()


def _candidates(sketches: Sketches, similarity: float) -> tuple[Numbers, Numbers]:
    """Pairs of places that share a band and the answer, and are not refuted by their bitmaps."""
    codes = [np.zeros(0, np.uint64)]
    for band in range(BANDS):
        # Within a bucket those that share the next band too lie together, should there be more than are compared.
        key, second = sketches.bands[:, band], sketches.bands[:, (band + 1) % BANDS]
        order = np.lexsort((second, key))
        same = key[order][1:] == key[order][:-1]
        order = order[np.concatenate([same, [False]]) | np.concatenate([[False], same])] if len(same) else order[:0]
        for distance in range(1, _NEIGHBOURS + 1):
            left, right = order[:-distance], order[distance:]
            together = key[left] == key[right]
            if not together.any():
                break
            together &= sketches.answers[left] == sketches.answers[right]
            left, right = left[together], right[together]
            alike = _may_be_alike(sketches, left, right, similarity)
            low, high = np.minimum(left[alike], right[alike]), np.maximum(left[alike], right[alike])
            codes.append(low.astype(np.uint64) << np.uint64(32) | high.astype(np.uint64))
    pairs = np.unique(np.concatenate(codes))
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _may_be_alike(sketches: Sketches, left: Numbers, right: Numbers, similarity: float) -> Numbers:
    differing = np.zeros(len(left), np.float64)
    for word in range(sketches.bits.shape[1]):
        differing += np.bitwise_count(sketches.bits[left, word] ^ sketches.bits[right, word])
    total = sketches.sizes[left].astype(np.float64) + sketches.sizes[right]
    return np.asarray(differing <= total * (1 - similarity) / (1 + similarity))


class Union:
    """Which of n places belong together (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, place: int) -> int:
        """The place that stands for all that it belongs together with."""
        parents = self._parents
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    def join(self, one: int, other: int) -> None:
        """These two belong together."""
        one, other = self.root(one), self.root(other)
        self._parents[max(one, other)] = min(one, other)

    def labels(self) -> Numbers:
        """The root of every place."""
        return np.asarray([self.root(place) for place in range(len(self._parents))], np.int64)
