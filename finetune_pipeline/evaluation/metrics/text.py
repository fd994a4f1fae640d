"""Metrics of texts. JSON answers are compared as JSON with sorted keys."""

import re
from collections import Counter
from typing import Any

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric, MetricError, rounded, thousandths
from finetune_pipeline.evaluation.metrics.values import answer_text
from finetune_pipeline.settings import RegexMetric
from finetune_pipeline.words import as_displayed, visible_form, words


class Exact(Metric):
    """Counts answers that are the expected one."""

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return 1 of 1 if the answer is the expected one."""
        return Count(int(answer.exact), 1)


class Contains(Metric):
    """Counts answers that contain the expected text."""

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return 1 of 1 if the visible form of the answer contains that of the expected text."""
        return Count(int(visible_form(answer_text(question.expected)) in visible_form(answer.text)), 1)


class Regex(Metric):
    """Counts answers in which a regular expression finds the expected text, or anything if it has no group."""

    def __init__(self, settings: RegexMetric) -> None:
        self._pattern = re.compile(settings.pattern)

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return 1 of 1 if the last match is as expected."""
        matches = [] if answer.problem else list(self._pattern.finditer(answer.raw))
        if not matches:
            return Count(0, 1)
        found = matches[-1][1] or "" if self._pattern.groups else None
        return Count(int(found is None or visible_form(found) == visible_form(answer_text(question.expected))), 1)


class Rouge1(Metric):
    """ROUGE-1 recall (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), see `count_words`."""

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return expected words in the answer, and all expected words."""
        return Count(*count_words(answer_text(question.expected), answer.text))


class RougeL(Metric):
    """ROUGE-L F1 (Lin 2004): the longest common subsequence of words.

    By this package's `words`, so that it works in every script. The package rouge-score splits at everything but
    a-z and 0-9.
    """

    def __init__(self) -> None:
        self._subsequence = _rapidfuzz("rougeL").LCSseq

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return F1 in thousandths."""
        wanted, found = words(answer_text(question.expected)), words(answer.text)
        return thousandths(2 * self._subsequence.similarity(wanted, found), max(1, len(wanted) + len(found)))


class Chrf(Metric):
    """chrF2 (Popović 2015) of one sentence, by sacrebleu with its defaults."""

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ImportError as error:
            raise missing_extra("chrf", "metrics") from error
        self._chrf: Any = CHRF()

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return chrF2 in thousandths."""
        expected = as_displayed(answer_text(question.expected))
        return rounded(self._chrf.sentence_score(as_displayed(answer.text), [expected]).score / 100)


class EditSimilarity(Metric):
    """1 - Levenshtein distance / length of the longer text, by characters as they are displayed."""

    def __init__(self) -> None:
        self._levenshtein = _rapidfuzz("edit_similarity").Levenshtein

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return the similarity in thousandths."""
        texts = [as_displayed(text).strip() for text in (answer_text(question.expected), answer.text)]
        longest = max(1, *map(len, texts))
        return thousandths(longest - self._levenshtein.distance(*texts), longest)


def _rapidfuzz(kind: str) -> Any:
    try:
        from rapidfuzz import distance
    except ImportError as error:
        raise missing_extra(kind, "metrics") from error
    return distance


def missing_extra(kind: str, extra: str) -> MetricError:
    """Return the error of a metric whose extra is not installed."""
    return MetricError(
        f"evaluation: the metric {kind} needs the extra {extra}, which is not installed; run "
        f".venv/bin/pip install -c constraints.txt -e '.[{extra}]', or remove the metric"
    )


def count_words(expected: str, answer: str) -> tuple[int, int]:
    """Return (correct, total) of ROUGE-1 recall: expected words in the answer, and all expected words.

    Only as many words of the answer count as are expected, so a longer answer gains nothing. A word counts as often as
    it is expected.

    >>> count_words("use a fire door", "A fire door, please, and a window")
    (3, 4)
    """
    wanted = words(expected)
    found = words(answer)[: len(wanted)]
    return (Counter(wanted) & Counter(found)).total(), len(wanted)
