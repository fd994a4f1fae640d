"""Measure how often a loop's judges agree with people, on redacted answers that people rated or corrected."""

from collections.abc import Callable

from finetune_pipeline.curation.redaction import redact_texts
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.metrics.judge import Judge, Pair
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.feedback.rated_pairs import rated_pairs
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.settings import LoopSettings


def scorer_with_agreement(loop: LoopSettings, log: Callable[[str], None], *, for_gate: bool = True) -> Scorer:
    """Return what scores the loop's answers, with the agreement of its judges measured.

    Args:
        for_gate: the gate decides by the scores, so a judge among them has to agree with people.

    Raises:
        MetricError: a metric cannot be used here, or the gate would count a judge that agrees with people too rarely.
    """
    scorer = loop_files.scorer(loop)
    for metric in (scorer.metric, *scorer.metrics):
        if isinstance(metric, Judge):
            with connect().read() as connection:
                rated = rated_pairs(connection, loop.name, metric.settings.max_pairs)
            pairs = []
            for one in rated:
                prompt, better, worse = redact_texts([one.prompt, one.better, one.worse], loop.curation.redaction)[0]
                pairs.append(Pair(prompt, better, worse))
            log(f"{metric.settings.key}: {metric.measure_agreement(pairs)}")
            if for_gate and metric is scorer.metric:
                metric.check_agreement()
    return scorer
