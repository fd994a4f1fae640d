"""Heuristics for answers that are bad training data."""

import re
from collections import Counter

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\S+")
_RUN = 10
_SHORT = 30


def repetition(text: str) -> float:
    """The share of a text (0 to 1, by characters of its words) in runs of 10 words that it has said before.

    One of the measures by which Rae et al. (2021, "Scaling Language Models: Methods, Analysis & Insights from Training
    Gopher", table A1) leave out pages, there for runs of 5 to 10 words. A text of fewer than 30 words has 0: it has no
    room to go round.
    """
    if len(text) < 2 * _SHORT:
        return 0.0
    words = _WORDS.findall(text)
    if len(words) < _SHORT:
        return 0.0
    seen: Counter[tuple[str, ...]] = Counter()
    again = [False] * len(words)
    for start in range(len(words) - _RUN + 1):
        run = tuple(words[start : start + _RUN])
        seen[run] += 1
        if seen[run] > 1:
            again[start : start + _RUN] = [True] * _RUN
    total = sum(map(len, words))
    return sum(len(word) for word, said in zip(words, again, strict=True) if said) / total
