"""Comparison of two models' answers to the same questions: totals, slices, wordings, questions won and lost. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import Field

from finetune_pipeline.evaluation.benchmark import Benchmark, BenchmarkQuestion
from finetune_pipeline.evaluation.constant_baseline import ConstantAnswer, best_constant
from finetune_pipeline.evaluation.gate import QualityFloor, Verdict, decide
from finetune_pipeline.evaluation.scoring import Metric, Scorer, Scores
from finetune_pipeline.evaluation.significance import Significance, paired_test
from finetune_pipeline.records import Record
from finetune_pipeline.settings import GateSettings


class ComparisonError(ValueError):
    """Two models cannot be compared; the message says why."""


class BenchmarkAnswer(Record):
    """One model's answer to one question of the benchmark."""

    id: str = Field(description="Id of the question.")
    text: str
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among value tokens.")
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class Speed(Record):
    """Speed of one model, measured one prompt at a time."""

    latency_p50_ms: float = Field(ge=0, description="Median latency of an answer in milliseconds.")
    latency_p95_ms: float = Field(ge=0, description="95th percentile of the latency in milliseconds.")
    tokens_per_second: float = Field(ge=0, description="Generated tokens divided by generation time.")
    prompts: int = Field(ge=1, description="Number of timed answers.")
    threads: int | None = Field(default=None, description="Number of threads for decoding, fixed while timing.")
    contention: str | None = Field(
        default=None,
        description="CPU time used by other processes while timing; if set, this is not the model's own speed.",
    )


@dataclass(frozen=True)
class ScoreTotals:
    """Sums of the scores of many answers; see `Scores` for each field."""

    questions: int
    correct: int
    total: int
    exact: int
    valid: int
    compliant: int | None  # None if the loop has no rules
    stated: int
    hallucinated: int


def sum_scores(scores: Sequence[Scores]) -> ScoreTotals:
    """Return the sums of these scores."""
    compliant = [score.compliant for score in scores if score.compliant is not None]
    return ScoreTotals(
        questions=len(scores),
        correct=sum(score.correct for score in scores),
        total=sum(score.total for score in scores),
        exact=sum(score.exact for score in scores),
        valid=sum(score.valid for score in scores),
        compliant=sum(compliant) if compliant else None,
        stated=sum(score.stated for score in scores),
        hallucinated=sum(score.hallucinated for score in scores),
    )


@dataclass(frozen=True)
class ModelResult:
    """One model's answers and scores.

    Attributes:
        name: display name, such as `aec_parser@v1.2.0` or "challenger".
        gguf_sha256: hash of the GGUF, or the combined hash of base and adapter.
        size_bytes: size of the GGUF, including its adapter.
        speed: measured together with the other model; None if not measured.
    """

    name: str
    gguf_sha256: str
    size_bytes: int
    answers: tuple[BenchmarkAnswer, ...]
    scores: tuple[Scores, ...]
    speed: Speed | None = None

    @cached_property
    def totals(self) -> ScoreTotals:
        """Sums over all answers."""
        return sum_scores(self.scores)


@dataclass(frozen=True)
class QuestionComparison:
    """One question with the answers of both models."""

    question: BenchmarkQuestion
    champion: BenchmarkAnswer
    champion_scores: Scores
    challenger: BenchmarkAnswer
    challenger_scores: Scores

    @property
    def change(self) -> int:
        """The challenger's score minus the champion's."""
        return self.challenger_scores.correct - self.champion_scores.correct


@dataclass(frozen=True)
class GroupChange:
    """Scores of both models on one slice or wording of the benchmark."""

    name: str
    champion: ScoreTotals
    challenger: ScoreTotals

    @property
    def change(self) -> int:
        """The challenger's score minus the champion's."""
        return self.challenger.correct - self.champion.correct

    @property
    def points(self) -> float:
        """The change as a fraction of the group's highest possible score, -1 to 1."""
        return self.change / self.champion.total


@dataclass(frozen=True)
class Comparison:
    """Champion and challenger on one benchmark."""

    metric: Metric
    benchmark_sha256: str
    champion: ModelResult
    challenger: ModelResult
    questions: tuple[QuestionComparison, ...]
    slices: tuple[GroupChange, ...]
    wordings: tuple[GroupChange, ...]  # empty if the benchmark has no wordings
    significance: Significance
    constant: ConstantAnswer
    structured: bool  # the loop has an output schema

    @property
    def quality_floor(self) -> QualityFloor:
        """Measurements of the challenger that count whatever the champion's score; decoded without a schema."""
        totals = self.challenger.totals
        return QualityFloor(self.constant.correct, totals.valid, totals.questions, self.structured)

    @property
    def contention(self) -> str | None:
        """CPU time used by other processes while the models were timed, if too much for a valid measurement."""
        speeds = (self.champion.speed, self.challenger.speed)
        return next((speed.contention for speed in speeds if speed and speed.contention), None)

    @property
    def regressed_slices(self) -> tuple[str, ...]:
        """Names of the slices in which the challenger's score is lower."""
        return tuple(group.name for group in self.slices if group.change < 0)

    @property
    def won(self) -> tuple[QuestionComparison, ...]:
        """Questions in which the challenger's score is higher, largest gain first."""
        return tuple(sorted((one for one in self.questions if one.change > 0), key=lambda one: -one.change))

    @property
    def lost(self) -> tuple[QuestionComparison, ...]:
        """Questions in which the challenger's score is lower, largest loss first."""
        return tuple(sorted((one for one in self.questions if one.change < 0), key=lambda one: one.change))


def score_model(
    name: str,
    sha256: str,
    size_bytes: int,
    answers: Sequence[BenchmarkAnswer],
    benchmark: Benchmark,
    scorer: Scorer,
    speed: Speed | None = None,
) -> ModelResult:
    """Score one model's answers, which are in the order of the benchmark's questions.

    Raises:
        ComparisonError: the answers belong to other questions.
    """
    _check_same_questions(name, answers, benchmark)
    scores = tuple(
        scorer.score(question.expected, answer.text)
        for question, answer in zip(benchmark.questions, answers, strict=True)
    )
    return ModelResult(name, sha256, size_bytes, tuple(answers), scores, speed)


def compare(benchmark: Benchmark, scorer: Scorer, champion: ModelResult, challenger: ModelResult) -> Comparison:
    """Compare two models that answered the same benchmark.

    Args:
        scorer: the one that scored both models.

    Raises:
        ComparisonError: one of them answered other questions.
    """
    for model in (champion, challenger):
        _check_same_questions(model.name, model.answers, benchmark)
    columns = (benchmark.questions, champion.answers, champion.scores, challenger.answers, challenger.scores)
    questions = tuple(QuestionComparison(*row) for row in zip(*columns, strict=True))
    significance = paired_test(
        [score.correct for score in champion.scores],
        [score.correct for score in challenger.scores],
        champion.totals.total,
    )
    return Comparison(
        metric=scorer.metric,
        benchmark_sha256=benchmark.sha256,
        champion=champion,
        challenger=challenger,
        questions=questions,
        slices=_group(questions, lambda question: question.slice),
        wordings=_group(questions, lambda question: question.wording),
        significance=significance,
        constant=best_constant([q.expected for q in benchmark.questions], scorer.metric, structured=scorer.structured),
        structured=scorer.structured,
    )


def judge(comparison: Comparison, settings: GateSettings) -> Verdict:
    """Return the gate's verdict on a comparison."""
    return decide(
        comparison.champion.totals.correct,
        comparison.challenger.totals.correct,
        comparison.champion.totals.total,
        comparison.quality_floor,
        settings,
        comparison.significance,
        comparison.regressed_slices,
    )


def _check_same_questions(name: str, answers: Sequence[BenchmarkAnswer], benchmark: Benchmark) -> None:
    if [answer.id for answer in answers] != [question.id for question in benchmark.questions]:
        raise ComparisonError(
            f"{name} answered other questions ({len(answers):,}) than the benchmark has "
            f"({len(benchmark.questions):,}); evaluate it again on this benchmark"
        )


def _group(
    questions: Sequence[QuestionComparison], name_of: Callable[[BenchmarkQuestion], str | None]
) -> tuple[GroupChange, ...]:
    groups: dict[str, list[QuestionComparison]] = {}
    for one in questions:
        name = name_of(one.question)
        if name is not None:
            groups.setdefault(name, []).append(one)
    return tuple(
        GroupChange(
            name,
            sum_scores([one.champion_scores for one in members]),
            sum_scores([one.challenger_scores for one in members]),
        )
        for name, members in sorted(groups.items())
    )
