"""Comparison of two models' answers to the same questions: totals, slices, wordings, questions won and lost. Pure.

The base model's answers are beside them if the base is neither of the two. They decide nothing.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import Field

from finetune_pipeline.evaluation.benchmark import Benchmark, BenchmarkQuestion, OpenQuestion
from finetune_pipeline.evaluation.constant_baseline import ConstantAnswer, best_constant
from finetune_pipeline.evaluation.gate import BudgetState, QualityFloor, Verdict, decide
from finetune_pipeline.evaluation.metrics import Count
from finetune_pipeline.evaluation.metrics.judge import Judgement
from finetune_pipeline.evaluation.performance import Performance
from finetune_pipeline.evaluation.regression import RegressionSuite, RegressionTest, regression_test
from finetune_pipeline.evaluation.scoring import MetricLabel, Scorer, Scores
from finetune_pipeline.evaluation.significance import (
    PairedScores,
    Significance,
    SliceTest,
    compare_slices,
    paired_test,
)
from finetune_pipeline.records import Record, same_answer
from finetune_pipeline.settings import GateSettings

Role = Literal["base", "champion", "challenger"]
Flip = Literal["correct to wrong", "score fell", "wrong to correct", "score rose", "changed at equal score"]
FLIPS: tuple[Flip, ...] = get_args(Flip)
"""What can change between two answers to a question, the losses first. Correct is the full score of the question."""

_MOST_LOST = 0.05  # fraction of the correct answers of a sample that constrained decoding may cost unnoticed


class ComparisonError(ValueError):
    """Two models cannot be compared; the message says why."""


class BenchmarkAnswer(Record):
    """One model's answer to one question of the benchmark."""

    id: str = Field(description="Id of the question.")
    text: str
    confidence: float | None = Field(default=None, ge=0, le=1, description="Lowest probability among value tokens.")
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    seconds: float | None = Field(
        default=None, ge=0, description="Time from the start of the prompt to the last token, beside other answers."
    )
    refused: str | None = Field(
        default=None, description="Why there is no text: the completion did not follow its schema to the end."
    )


class Speed(Record):
    """Speed of one model, measured one prompt at a time."""

    latency_p50_ms: float = Field(ge=0, description="Median latency of an answer in milliseconds.")
    latency_p95_ms: float = Field(ge=0, description="95th percentile of the latency in milliseconds.")
    first_token_p50_ms: float | None = Field(
        default=None, ge=0, description="Median time to the first token in milliseconds."
    )
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
    metrics: tuple[Count, ...] = ()  # by each further metric


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
        metrics=tuple(
            Count(sum(one.correct for one in counts), sum(one.total for one in counts))
            for counts in zip(*(score.metrics for score in scores), strict=True)
        ),
    )


@dataclass(frozen=True)
class UnconstrainedSample:
    """One model's answers to the benchmark's fixed sample without constrained decoding, and their scores.

    They show what the model has learned to write by itself.
    """

    answers: tuple[BenchmarkAnswer, ...]
    scores: tuple[Scores, ...]

    @cached_property
    def totals(self) -> ScoreTotals:
        """Sums over all answers."""
        return sum_scores(self.scores)


@dataclass(frozen=True)
class ModelResult:
    """One model's answers, decoded as in service, and their scores.

    Attributes:
        name: display name, such as `aec_parser@v1.2.0` or "challenger".
        gguf_sha256: hash of the GGUF, or the combined hash of base and adapter.
        size_bytes: size of the GGUF, including its adapter; None for a model of another server.
        sample: the answers to a sample of the questions without constrained decoding.
        open_answers: to the questions that have no expected answer.
        always_correct: questions of which every sampled answer is correct; None without sampled answers.
        speed: measured together with the other models; None if not measured.
        performance: measured at saturation; None if not measured.
        origin: server, model and time of answers that a model of another server gave; its files are unknown.
    """

    name: str
    gguf_sha256: str
    size_bytes: int | None
    answers: tuple[BenchmarkAnswer, ...]
    scores: tuple[Scores, ...]
    sample: UnconstrainedSample
    speed: Speed | None = None
    open_answers: tuple[BenchmarkAnswer, ...] = ()
    always_correct: int | None = None
    origin: str | None = None
    performance: Performance | None = None

    @property
    def response_tokens(self) -> float | None:
        """Mean length of the answers in tokens; None if no answer has any."""
        lengths = [answer.completion_tokens for answer in self.answers if answer.completion_tokens]
        return sum(lengths) / len(lengths) if lengths else None

    @cached_property
    def totals(self) -> ScoreTotals:
        """Sums over all answers."""
        return sum_scores(self.scores)


@dataclass(frozen=True)
class QuestionComparison:
    """One question with the answers of both models, and of the base model if it is a third one."""

    question: BenchmarkQuestion
    champion: BenchmarkAnswer
    champion_scores: Scores
    challenger: BenchmarkAnswer
    challenger_scores: Scores
    base: BenchmarkAnswer | None = None
    base_scores: Scores | None = None

    @property
    def change(self) -> int:
        """The challenger's score minus the champion's."""
        return self.challenger_scores.correct - self.champion_scores.correct

    @property
    def flip(self) -> Flip | None:
        """How the challenger's answer differs from the champion's; None if it is the same answer."""
        before, after = self.champion_scores, self.challenger_scores
        if self.change == 0:
            return None if same_answer(self.champion.text, self.challenger.text) else "changed at equal score"
        if before.correct == before.total:
            return "correct to wrong"
        if after.correct == after.total:
            return "wrong to correct"
        return "score rose" if self.change > 0 else "score fell"


@dataclass(frozen=True)
class GroupChange:
    """Scores of both models on one slice or wording of the benchmark, and of the base model if it is a third one."""

    name: str
    champion: ScoreTotals
    challenger: ScoreTotals
    base: ScoreTotals | None = None

    @property
    def change(self) -> int:
        """The challenger's score minus the champion's."""
        return self.challenger.correct - self.champion.correct

    @property
    def points(self) -> float:
        """The change as a fraction of the group's highest possible score, -1 to 1."""
        return self.change / self.champion.total if self.champion.total else 0.0  # values may have a weight of 0


@dataclass(frozen=True)
class Comparison:
    """Champion and challenger on one benchmark; `base` is None if the base model is one of the two."""

    metric: MetricLabel  # the gate's
    metrics: tuple[MetricLabel, ...]  # the further ones
    benchmark_sha256: str
    champion: ModelResult
    challenger: ModelResult
    questions: tuple[QuestionComparison, ...]
    slices: tuple[GroupChange, ...]
    wordings: tuple[GroupChange, ...]  # empty if the benchmark has no wordings
    significance: Significance
    constant: ConstantAnswer
    structured: bool  # the loop has an output schema
    constrained: bool = False  # decoding was constrained to it
    max_tokens: int | None = None  # the limit of an answer, if known
    open_questions: tuple[OpenQuestion, ...] = ()  # answered for people to compare
    base: ModelResult | None = None
    judgements: tuple[Judgement, ...] = ()  # of the judges among the metrics
    samples: int = 0  # sampled answers to each question
    regression: RegressionSuite | None = None  # None if no promotion has fixed anything yet

    @property
    def problems(self) -> tuple[str, ...]:
        """What stands out in the challenger's answers and explains a low score, without any text of them."""
        answers, total = self.challenger.answers, len(self.questions)
        texts = [answer.text.strip() for answer in answers]
        found = []
        sample = self.challenger.sample
        if self.structured and not sample.totals.valid:
            parsed = sum(_is_json(answer.text) for answer in sample.answers)
            asked = f"of {sample.totals.questions:,} answers without constrained decoding"
            what = f"{parsed:,} are JSON" if parsed else "none is JSON"
            found.append(f"none {asked} passes the output schema: {what}")
        if empty := sum(not text for text in texts):
            found.append(f"{empty:,} of {total:,} answers are empty")
        by_question = dict(zip((answer.id for answer in answers), self.challenger.scores, strict=True))
        kept, free = sum(by_question[answer.id].correct for answer in sample.answers), sample.totals.correct
        if self.constrained and free - kept > _MOST_LOST * free:
            found.append(
                f"constrained decoding lowers the score of the sample from {free:,} to {kept:,} of "
                f"{sample.totals.total:,}: does the schema have the properties in the order of the training answers?"
            )
        cut = sum(answer.completion_tokens >= self.max_tokens for answer in answers) if self.max_tokens else 0
        if 10 * cut >= total:
            found.append(f"{cut:,} of {total:,} answers were cut off at evaluation.max_tokens: {self.max_tokens}")
        common = max(Counter(texts).values())
        expected = max(Counter(json.dumps(one.question.expected, sort_keys=True) for one in self.questions).values())
        if total > 1 and 2 * common > total and common > 1.2 * expected:  # not if most questions have one answer
            found.append(f"{common:,} of {total:,} answers are the same text")
        fallen = sorted((one for one in self.slices if one.change < 0), key=lambda one: one.points)[:3]
        if fallen:
            names = ", ".join(f"{one.name} ({one.points * 100:+.1f} points)" for one in fallen)
            found.append(f"slices that lost most: {names}")
        return tuple(found)

    @property
    def quality_floor(self) -> QualityFloor:
        """Measurements of the challenger that count whatever the champion's score."""
        totals = self.challenger.sample.totals
        return QualityFloor(self.constant.correct, totals.valid, totals.questions, self.structured)

    @property
    def contention(self) -> str | None:
        """CPU time used by other processes while the models were timed, if too much for a valid measurement."""
        speeds = (self.champion.speed, self.challenger.speed)
        return next((speed.contention for speed in speeds if speed and speed.contention), None)

    @property
    def saturation(self) -> str | None:
        """How the challenger was measured at saturation; None if it was not."""
        measured = self.challenger.performance
        return f"At saturation: {measured.conditions}." if measured else None

    @property
    def models(self) -> dict[Role, ModelResult]:
        """The compared models by role, the base model first if it is a third one."""
        base: dict[Role, ModelResult] = {"base": self.base} if self.base else {}
        return {**base, "champion": self.champion, "challenger": self.challenger}

    @property
    def summary(self) -> str:
        """Who is better, in one sentence, without the gate's rule."""
        low, high = (round(100 * bound, 1) for bound in (self.significance.gain_low, self.significance.gain_high))
        gain = 100 * (self.challenger.totals.correct - self.champion.totals.correct) / self.champion.totals.total
        numbers = f"{gain:+.1f} points, 95% confidence interval {low:+.1f} to {high:+.1f}"
        if low > 0:
            return f"{self.challenger.name} is better than {self.champion.name}: {numbers}"
        if high < 0:
            return f"{self.challenger.name} is worse than {self.champion.name}: {numbers}"
        return f"No clear difference between {self.challenger.name} and {self.champion.name}: {numbers}"

    def slice_tests(self, settings: GateSettings) -> tuple[SliceTest, ...]:
        """Return the tests of the slices for a loss beyond the gate's margin."""
        by_slice: dict[str, list[QuestionComparison]] = {}
        for one in self.questions:
            by_slice.setdefault(one.question.slice, []).append(one)
        paired = {name: paired_scores(by_slice[name]) for name in sorted(by_slice)}
        return compare_slices(paired, settings.slice_margin, settings.significance_level)

    def regression_test(self, settings: GateSettings) -> RegressionTest | None:
        """Return the test of the regression suite with the gate's tolerance; None without a suite."""
        if self.regression is None:
            return None
        return regression_test(self.regression.counts, settings.regression_tolerance, settings.significance_level)

    @property
    def won(self) -> tuple[QuestionComparison, ...]:
        """Questions in which the challenger's score is higher, largest gain first."""
        return tuple(sorted((one for one in self.questions if one.change > 0), key=lambda one: -one.change))

    @property
    def ties(self) -> int:
        """Number of questions in which both models have the same score, without those that a judge set aside."""
        return sum(one.change == 0 and one.champion_scores.total > 0 for one in self.questions)

    @property
    def lost(self) -> tuple[QuestionComparison, ...]:
        """Questions in which the challenger's score is lower, largest loss first."""
        return tuple(sorted((one for one in self.questions if one.change < 0), key=lambda one: one.change))


def score_model(
    name: str,
    sha256: str,
    size_bytes: int | None,
    answers: Sequence[BenchmarkAnswer],
    benchmark: Benchmark,
    scorer: Scorer,
    speed: Speed | None = None,
    unconstrained: Sequence[BenchmarkAnswer] | None = None,
) -> ModelResult:
    """Score one model's answers, which are in the order of the benchmark's questions.

    Args:
        unconstrained: the answers to the benchmark's sample without constrained decoding; None if all were decoded so.

    Raises:
        ComparisonError: the answers belong to other questions.
    """
    if unconstrained is None:
        sampled = {question.id for question in benchmark.sample.questions}
        unconstrained = [answer for answer in answers if answer.id in sampled]
    scores = _score(name, answers, benchmark, scorer)
    sample = UnconstrainedSample(tuple(unconstrained), _score(name, unconstrained, benchmark.sample, scorer))
    return ModelResult(name, sha256, size_bytes, tuple(answers), scores, sample, speed)


def _score(name: str, answers: Sequence[BenchmarkAnswer], benchmark: Benchmark, scorer: Scorer) -> tuple[Scores, ...]:
    _check_same_questions(name, answers, benchmark)
    scored = [
        (answer, scorer.score(question, answer.text))
        for question, answer in zip(benchmark.questions, answers, strict=True)
    ]
    return tuple(replace(scores, problem=answer.refused) if answer.refused else scores for answer, scores in scored)


def count_always_correct(benchmark: Benchmark, scorer: Scorer, samples: Sequence[Sequence[BenchmarkAnswer]]) -> int:
    """Return the number of questions of which every sampled answer has the full score (pass^k, Yao et al. 2024).

    Args:
        benchmark: its questions were answered several times.
        scorer: the loop's; the gate's metric counts.
        samples: answers in the order of the questions, once for each time.
    """

    def is_correct(question: BenchmarkQuestion, answer: BenchmarkAnswer) -> bool:
        count = scorer.count(question, answer.text)
        return count.correct == count.total

    return sum(
        all(is_correct(question, answer) for answer in answers)
        for question, *answers in zip(benchmark.questions, *samples, strict=True)
    )


def compare(
    benchmark: Benchmark,
    scorer: Scorer,
    champion: ModelResult,
    challenger: ModelResult,
    base: ModelResult | None = None,
) -> Comparison:
    """Compare two models that answered the same benchmark.

    Args:
        scorer: the one that scored all models.
        base: the base model if it is neither of the two; it is shown beside them.

    Raises:
        ComparisonError: one of them answered other questions.
    """
    for model in (champion, challenger, *([base] if base else [])):
        _check_same_questions(model.name, model.answers, benchmark)
    columns: list[Sequence[Any]] = [benchmark.questions]
    for model in (champion, challenger, *([base] if base else [])):
        columns += [model.answers, model.scores]
    questions = tuple(QuestionComparison(*row) for row in zip(*columns, strict=True))
    significance = paired_test(paired_scores(questions))
    return Comparison(
        metric=scorer.label,
        metrics=tuple(scorer.labels),
        benchmark_sha256=benchmark.sha256,
        champion=champion,
        challenger=challenger,
        questions=questions,
        slices=_group(questions, lambda question: question.slice),
        wordings=_group(questions, lambda question: question.wording),
        significance=significance,
        constant=best_constant(benchmark.questions, scorer),
        structured=scorer.structured,
        open_questions=benchmark.open_questions,
        base=base,
    )


def judge(comparison: Comparison, settings: GateSettings, budget: BudgetState | None = None) -> Verdict:
    """Return the gate's verdict on a comparison.

    Args:
        settings: the loop's gate.
        budget: state of the error budget; needed with `significance: required`.
    """
    return decide(
        comparison.champion.totals.correct,
        comparison.challenger.totals.correct,
        comparison.champion.totals.total,
        comparison.quality_floor,
        settings,
        comparison.significance,
        comparison.slice_tests(settings),
        budget,
        comparison.regression_test(settings),
    )


def paired_scores(questions: Sequence[QuestionComparison]) -> PairedScores:
    """Return the scores of both models on those of the questions that count, for a paired test."""
    questions = [one for one in questions if one.champion_scores.total]  # others have no verdict of the gate's judge
    return PairedScores(
        champion=[one.champion_scores.correct for one in questions],
        challenger=[one.challenger_scores.correct for one in questions],
        total=sum(one.champion_scores.total for one in questions),
        clusters=[one.question.cluster for one in questions],
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
            sum_scores(of_base) if (of_base := [one.base_scores for one in members if one.base_scores]) else None,
        )
        for name, members in sorted(groups.items())
    )
