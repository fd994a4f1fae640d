"""Overlap with the benchmark: exact Jaccard similarity of character shingles, and shared word n-grams."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from finetune_pipeline.words import visible_form, words

SHINGLE = 5  # characters
NGRAM = 8  # words
# Shorter questions are not looked for within other texts. In Korean or Turkish, three words say as much as four.
MIN_QUESTION_WORDS = 3
MIN_QUESTION_LETTERS = 12  # of three words together; a Hangul syllable has two or three letters
# Questions that are shorter still, as in Korean or Hebrew, are looked for as a sentence or line of their own.
MIN_SENTENCE_WORDS = 2
MIN_SENTENCE_LETTERS = 6
_CLAUSE_END = re.compile(r"[\n\r;!?…。｡！？：；؟؛۔।॥။។]+|[.:](?!\S)")
CONTAINED = 0.9  # fraction of the shorter text's n-grams


def shingles(text: str) -> frozenset[str]:
    """Return the 5-character shingles of the visible form of a text; a shorter text is its only shingle."""
    text = visible_form(text)
    return frozenset([text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets: 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


class NearIndex:
    """Index of a small fixed set of texts, which finds near-duplicates of a text, and texts that contain or are in it.

    The set is small (a benchmark), so an inverted index gives the exact similarity. A sketch such as MinHash would miss
    some pairs, and one leaked question is too many.

    A text contains another if 90% of the word 8-grams of the shorter text are in the longer one. Other projects
    decontaminate by word n-grams too (13-grams in GPT-3, Brown et al. 2020; 8-grams, 70% of them, in PaLM, Chowdhery
    et al. 2022). A text of the set with 4 to 7 words, or with 3 of at least 12 letters together, is contained where all
    its words stand in a row. A shorter one, of 2 words and 6 letters, is contained where it is a sentence or line of
    its own. A single word is contained in nothing, and other texts with fewer than 8 words are part of nothing, since
    short phrases occur everywhere.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Index texts by id."""
        words_of = {name: words(text) for name, text in texts.items()}
        self._shingles = {name: shingles(text) for name, text in texts.items()}
        self._ngrams = {name: ngrams for name, text in words_of.items() if (ngrams := _ngrams(text))}
        self._short: dict[str, list[list[str]]] = defaultdict(list)  # by their first word
        for text in words_of.values():
            if _is_question(text) and len(text) < NGRAM:
                self._short[text[0]].append(text)
        self._sentences = {tuple(text) for text in words_of.values() if _is_sentence(text) and not _is_question(text)}
        self._with_shingle = _invert(self._shingles)
        self._with_ngram = _invert(self._ngrams)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """Return the id of the most similar text and its Jaccard similarity, or None if no shingle is shared."""
        given = shingles(text)
        shared = Counter(name for shingle in given for name in self._with_shingle.get(shingle, ()))
        similarities = [(n / (len(given) + len(self._shingles[name]) - n), name) for name, n in shared.items()]
        if not similarities:
            return None
        similarity, name = max(similarities)
        return name, similarity

    def near(self, text: str, similarity: float) -> bool:
        """Return True if a text of the set has at least this similarity; faster than `nearest`.

        Two sets of that similarity share so many shingles that at least one of the rarest is among them, so only texts
        with one of those are compared (prefix filtering: Chaudhuri, Ganti and Kaushik 2006).
        """
        given = shingles(text)
        needed = math.ceil(similarity * len(given) - 1e-9)
        known = given & self._with_shingle.keys()
        if not known or len(known) < needed:
            return False
        rarest = sorted(known, key=lambda shingle: len(self._with_shingle[shingle]))[: len(known) - needed + 1]
        names = {name for shingle in rarest for name in self._with_shingle[shingle]}
        return any(jaccard(given, self._shingles[name]) >= similarity for name in names)

    def contains(self, text: str) -> bool:
        """Return True if this text contains one of the set, or is part of one."""
        found = words(text)
        for index, word in enumerate(found):
            if any(found[index : index + len(short)] == short for short in self._short.get(word, ())):
                return True
        if self._sentences and any(tuple(words(part)) in self._sentences for part in _CLAUSE_END.split(text)):
            return True
        ngrams = _ngrams(found)
        shared = Counter(name for ngram in ngrams & self._with_ngram.keys() for name in self._with_ngram[ngram])
        return any(n >= CONTAINED * min(len(ngrams), len(self._ngrams[name])) for name, n in shared.items())


def _is_question(found: Sequence[str]) -> bool:
    """Return True if the words of a short text are enough to be looked for within other texts."""
    enough = len(found) == MIN_QUESTION_WORDS and _letters(found) >= MIN_QUESTION_LETTERS
    return len(found) > MIN_QUESTION_WORDS or enough


def _is_sentence(found: Sequence[str]) -> bool:
    """Return True if the words of a short text are enough to be looked for as a sentence or line of other texts."""
    return len(found) >= MIN_SENTENCE_WORDS and _letters(found) >= MIN_SENTENCE_LETTERS


def _letters(found: Sequence[str]) -> int:
    return len(unicodedata.normalize("NFD", "".join(found)))


def _ngrams(found: Sequence[str]) -> frozenset[str]:
    """Return the word 8-grams."""
    return frozenset([" ".join(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)])


def _invert(sets: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """Return item -> names of the sets that have it."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, items in sets.items():
        for item in items:
            names[item].append(name)
    return dict(names)
