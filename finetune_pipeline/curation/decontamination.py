"""What is near the benchmark: by exact Jaccard similarity of character shingles, and by runs of words."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from finetune_pipeline.records import normalize

SHINGLE = 5
RUN = 8  # words
SHORTEST = 4  # words of a short question that is looked for within others
CONTAINED = 0.9
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:[.,]\d+)?")  # no spaces part those of Asia


def shingles(text: str) -> frozenset[str]:
    """The set of 5-character pieces of the normalised text; a shorter text is its own only piece."""
    text = normalize(text)
    return frozenset([text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """How much two sets share: from 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def words_of(text: str) -> list[str]:
    """The words of the normalised text, without its punctuation."""
    return _WORD.findall(normalize(text))


def runs(words: Sequence[str]) -> frozenset[str]:
    """Every 8 words in a row; fewer words have none."""
    return frozenset([" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)])


class NearIndex:
    """Finds the text of a small fixed set that another text is nearly the same as, contains, or is part of.

    The set is small (a benchmark), so an inverted index gives the exact similarity; a sketch such as MinHash would
    miss some pairs, and one leaked question is too many.

    Contained means that of the 8-word runs of the shorter text, 90 % are in the longer one. Runs of words are what
    decontamination goes by elsewhere (13 words in GPT-3, Brown et al. 2020; 8 words, 70 % of them, in PaLM, Chowdhery
    et al. 2022). A text of the set of 4 to 7 words is contained where all of them stand in a row; one of 1 to 3 is in
    nothing, and no other text of fewer than 8 words is part of one, since short phrases are everybody's.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Index texts by id."""
        self._pieces = {name: shingles(text) for name, text in texts.items()}
        words = {name: words_of(text) for name, text in texts.items()}
        self._runs = {name: found for name, said in words.items() if (found := runs(said))}
        self._short: dict[str, list[list[str]]] = {}  # by their first word
        for said in words.values():
            if SHORTEST <= len(said) < RUN:
                self._short.setdefault(said[0], []).append(said)
        self._holders = _holders(self._pieces)
        self._held = frozenset(self._holders)
        self._commonness = {piece: len(names) for piece, names in self._holders.items()}
        self._run_holders = _holders(self._runs)
        self._held_runs = frozenset(self._run_holders)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """The id of the most similar text and the Jaccard similarity (0 to 1), or None if nothing is shared."""
        pieces = shingles(text)
        shared = Counter(name for piece in pieces for name in self._holders.get(piece, ()))
        scores = [(n / (len(pieces) + len(self._pieces[name]) - n), name) for name, n in shared.items()]
        if not scores:
            return None
        similarity, name = max(scores)
        return name, similarity

    def near(self, text: str, similarity: float) -> bool:
        """Whether the most similar text is at least so similar; the same as by `nearest`, in a fraction of its time.

        Two sets of that similarity share so much of the smaller one that one of its rarest pieces is among it: only
        texts that hold one of those are compared (prefix filtering: Chaudhuri, Ganti and Kaushik 2006).
        """
        pieces = shingles(text)
        needed = math.ceil(similarity * len(pieces) - 1e-9)
        known = pieces & self._held
        if not known or len(known) < needed:
            return False
        rarest = sorted(known, key=self._commonness.__getitem__)[: len(known) - needed + 1]
        names = {name for piece in rarest for name in self._holders[piece]}
        return any(jaccard(pieces, self._pieces[name]) >= similarity for name in names)

    def contains(self, text: str) -> bool:
        """Whether one of the texts is contained in this one, or this one in it."""
        words = words_of(text)
        if self._has_short(words):
            return True
        found = runs(words)
        shared = Counter(name for run in found & self._held_runs for name in self._run_holders[run])
        return any(n >= CONTAINED * min(len(found), len(self._runs[name])) for name, n in shared.items())

    def _has_short(self, words: list[str]) -> bool:
        """Whether all words of one of the short texts stand in a row."""
        return any(
            words[place : place + len(short)] == short
            for place, word in enumerate(words)
            if word in self._short
            for short in self._short[word]
        )


def _holders(pieces: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    holders: dict[str, list[str]] = defaultdict(list)
    for name, held in pieces.items():
        for piece in held:
            holders[piece].append(name)
    return dict(holders)
