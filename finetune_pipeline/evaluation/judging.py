"""Verdicts of judges on a comparison: they score two answers together, after both models have answered."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune_pipeline.evaluation.benchmark import Benchmark
from finetune_pipeline.evaluation.comparison import ModelResult
from finetune_pipeline.evaluation.metrics.base import Count
from finetune_pipeline.evaluation.metrics.judge import Judge, Judgement
from finetune_pipeline.evaluation.scoring import Scorer, Scores


def judge_answers(
    scorer: Scorer, benchmark: Benchmark, champion: ModelResult, challenger: ModelResult
) -> tuple[ModelResult, ModelResult, tuple[Judgement, ...]]:
    """Return both models with the scores of all judges of a loop, and what these said.

    Raises:
        MetricError: the gate counts a judge that fails, or of whose verdicts none can be used.
    """
    judgements = []
    for index, metric in enumerate((scorer.metric, *scorer.metrics)):
        if not isinstance(metric, Judge):
            continue
        counts, judgement = metric.compare(
            benchmark.questions,
            [answer.text for answer in champion.answers],
            [answer.text for answer in challenger.answers],
            decides=index == 0,
        )
        judgements.append(judgement)
        champion = _with_counts(champion, index, [before for before, _ in counts])
        challenger = _with_counts(challenger, index, [after for _, after in counts])
    return champion, challenger, tuple(judgements)


def _with_counts(model: ModelResult, index: int, counts: Sequence[Count]) -> ModelResult:
    set_count: Callable[[Scores, Count], Scores] = _set_first if index == 0 else _setter(index - 1)
    return replace(model, scores=tuple(map(set_count, model.scores, counts)))


def _set_first(scores: Scores, count: Count) -> Scores:
    return replace(scores, correct=count.correct, total=count.total)


def _setter(index: int) -> Callable[[Scores, Count], Scores]:
    return lambda scores, count: replace(scores, metrics=(*scores.metrics[:index], count, *scores.metrics[index + 1 :]))
