"""Two models compared on the same questions: totals, slices, wordings, questions won and lost, significance. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from finetune_pipeline.evaluation.answers import Answer, Speed
from finetune_pipeline.evaluation.benchmark import Benchmark, Question
from finetune_pipeline.evaluation.constant_baseline import ConstantAnswer, best_constant
from finetune_pipeline.evaluation.gate import Verdict, Worth, decide
from finetune_pipeline.evaluation.metrics import Metric, Scorer, Scores
from finetune_pipeline.evaluation.significance import Significance, paired_test
from finetune_pipeline.settings import GateSettings


class ComparisonError(ValueError):
    """Two runs cannot be compared; the message says why."""


@dataclass(frozen=True)
class Totals:
    """Sums of the scores of many answers."""

    questions: int
    right: int
    total: int
    exact: int
    valid: int
    compliant: int | None  # None where the loop has no rules
    stated: int
    hallucinated: int


def total_of(scores: Sequence[Scores]) -> Totals:
    """The sums of these scores."""
    compliant = [score.compliant for score in scores if score.compliant is not None]
    return Totals(
        questions=len(scores),
        right=sum(score.right for score in scores),
        total=sum(score.total for score in scores),
        exact=sum(score.exact for score in scores),
        valid=sum(score.valid for score in scores),
        compliant=sum(compliant) if compliant else None,
        stated=sum(score.stated for score in scores),
        hallucinated=sum(score.hallucinated for score in scores),
    )


@dataclass(frozen=True)
class Side:
    """One of the two models, with what it answered.

    Attributes:
        name: what people call it: `aec_parser@v1.2.0`, "base model", "challenger".
        gguf_sha256: hash of the file that answered, or the identity of base and adapter.
        size_bytes: size of that file (with its adapter's).
        speed: measured in the same run as the other side's; None if it was not measured.
    """

    name: str
    gguf_sha256: str
    size_bytes: int
    answers: tuple[Answer, ...]
    scores: tuple[Scores, ...]
    speed: Speed | None = None

    @cached_property
    def totals(self) -> Totals:
        """The sums over all answers."""
        return total_of(self.scores)


@dataclass(frozen=True)
class Pair:
    """One question and both answers to it."""

    question: Question
    champion: Answer
    champion_scores: Scores
    challenger: Answer
    challenger_scores: Scores

    @property
    def change(self) -> int:
        """How much more the challenger has right."""
        return self.challenger_scores.right - self.champion_scores.right


@dataclass(frozen=True)
class GroupChange:
    """What both models have right in a part of the benchmark."""

    name: str
    champion: Totals
    challenger: Totals

    @property
    def change(self) -> int:
        """How much more the challenger has right."""
        return self.challenger.right - self.champion.right

    @property
    def points(self) -> float:
        """The change as a share of all that can be right in this part, -1 to 1."""
        return self.change / self.champion.total


@dataclass(frozen=True)
class Comparison:
    """Challenger against champion, question by question."""

    metric: Metric
    benchmark_sha256: str
    champion: Side
    challenger: Side
    pairs: tuple[Pair, ...]
    slices: tuple[GroupChange, ...]
    wordings: tuple[GroupChange, ...]  # empty where the benchmark names no wording
    significance: Significance
    constant: ConstantAnswer
    structured: bool  # the loop has an output schema

    @property
    def worth(self) -> Worth:
        """What the challenger is worth, whatever the champion is; its answers were decoded without a schema."""
        totals = self.challenger.totals
        return Worth(self.constant.right, totals.valid, totals.questions, self.structured)

    @property
    def disturbed(self) -> str | None:
        """Other work on the cores while the models were timed, if it was too much for a valid measurement."""
        speeds = (self.champion.speed, self.challenger.speed)
        return next((speed.disturbed for speed in speeds if speed and speed.disturbed), None)

    @property
    def falling_slices(self) -> tuple[str, ...]:
        """Slices in which the challenger has less right than the champion."""
        return tuple(group.name for group in self.slices if group.change < 0)

    @property
    def won(self) -> tuple[Pair, ...]:
        """Questions in which the challenger has more right, the largest gain first."""
        return tuple(sorted((pair for pair in self.pairs if pair.change > 0), key=lambda pair: -pair.change))

    @property
    def lost(self) -> tuple[Pair, ...]:
        """Questions in which it has less right, the largest loss first."""
        return tuple(sorted((pair for pair in self.pairs if pair.change < 0), key=lambda pair: pair.change))


def score_side(
    name: str,
    sha256: str,
    size_bytes: int,
    answers: Sequence[Answer],
    benchmark: Benchmark,
    scorer: Scorer,
    speed: Speed | None = None,
) -> Side:
    """Score one model's answers, which are in the order of the benchmark's questions.

    Raises:
        ComparisonError: the answers belong to other questions.
    """
    _same_questions(name, answers, benchmark)
    scores = tuple(
        scorer.score(question.expected, answer.text)
        for question, answer in zip(benchmark.questions, answers, strict=True)
    )
    return Side(name, sha256, size_bytes, tuple(answers), scores, speed)


def compare(benchmark: Benchmark, scorer: Scorer, champion: Side, challenger: Side) -> Comparison:
    """Compare two models that answered the same benchmark.

    Args:
        scorer: the one that scored both sides.

    Raises:
        ComparisonError: one of them answered other questions.
    """
    for side in (champion, challenger):
        _same_questions(side.name, side.answers, benchmark)
    columns = (benchmark.questions, champion.answers, champion.scores, challenger.answers, challenger.scores)
    pairs = tuple(Pair(*row) for row in zip(*columns, strict=True))
    significance = paired_test(
        [score.right for score in champion.scores],
        [score.right for score in challenger.scores],
        champion.totals.total,
    )
    return Comparison(
        metric=scorer.metric,
        benchmark_sha256=benchmark.sha256,
        champion=champion,
        challenger=challenger,
        pairs=pairs,
        slices=_groups(pairs, lambda question: question.slice),
        wordings=_groups(pairs, lambda question: question.wording),
        significance=significance,
        constant=best_constant([q.expected for q in benchmark.questions], scorer.metric, structured=scorer.structured),
        structured=scorer.structured,
    )


def judge(comparison: Comparison, settings: GateSettings) -> Verdict:
    """Ask the gate about a comparison."""
    return decide(
        comparison.champion.totals.right,
        comparison.challenger.totals.right,
        comparison.champion.totals.total,
        comparison.worth,
        settings,
        comparison.significance,
        comparison.falling_slices,
    )


def _same_questions(name: str, answers: Sequence[Answer], benchmark: Benchmark) -> None:
    if [answer.id for answer in answers] != [question.id for question in benchmark.questions]:
        raise ComparisonError(
            f"{name} answered other questions ({len(answers):,}) than the benchmark has "
            f"({len(benchmark.questions):,}); evaluate it again on this benchmark"
        )


def _groups(pairs: Sequence[Pair], name_of: Callable[[Question], str | None]) -> tuple[GroupChange, ...]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        name = name_of(pair.question)
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return tuple(
        GroupChange(
            name,
            total_of([pair.champion_scores for pair in members]),
            total_of([pair.challenger_scores for pair in members]),
        )
        for name, members in sorted(groups.items())
    )
