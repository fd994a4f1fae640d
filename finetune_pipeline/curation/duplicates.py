"""Near-duplicates of the benchmark, by exact Jaccard similarity of character shingles."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from finetune_pipeline.records import normalise

SHINGLE = 5


def shingles(text: str) -> frozenset[str]:
    """The set of 5-character pieces of the normalised text; a shorter text is its own only piece."""
    text = normalise(text)
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


class NearIndex:
    """Finds the text of a small fixed set that another text is nearly the same as.

    The set is small (a benchmark), so an inverted index gives the exact similarity; a sketch such as MinHash would
    miss some pairs, and one leaked question is too many.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Index texts by id."""
        self._sizes: dict[str, int] = {}
        self._holders: dict[str, list[str]] = defaultdict(list)
        for name, text in texts.items():
            pieces = shingles(text)
            self._sizes[name] = len(pieces)
            for piece in pieces:
                self._holders[piece].append(name)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """The id of the most similar text and the Jaccard similarity (0 to 1), or None if nothing is shared."""
        pieces = shingles(text)
        shared = Counter(name for piece in pieces for name in self._holders.get(piece, ()))
        scores = [(n / (len(pieces) + self._sizes[name] - n), name) for name, n in shared.items()]
        if not scores:
            return None
        similarity, name = max(scores)
        return name, similarity
