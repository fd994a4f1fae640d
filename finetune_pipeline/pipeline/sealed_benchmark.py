"""Ask the sealed benchmark at every `sealed_every`-th promotion, and say whether the open one has been overfitted.

The answers are generated before the pointer moves, and the scores are recorded by the transaction that moves it. They
never decide, and no answer is shown.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.database import Database, connect
from finetune_pipeline.evaluation.report import scores_by_question
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.evaluation.sealed import compare_gains
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.regression_suite import OnProgress
from finetune_pipeline.registry.model_versions import list_models
from finetune_pipeline.registry.sealed_looks import SealedLook, SealedScores, list_looks, promotions_since_look
from finetune_pipeline.settings import LoopSettings


def sealed_scores(
    loop: LoopSettings, challenger: ModelSpec, report: Path, scorer: Scorer, on_progress: OnProgress
) -> SealedScores | None:
    """Return a challenger's scores on the sealed benchmark, and on the open one; None if this promotion asks nothing.

    The first promotion with a sealed benchmark asks it, and then every `sealed_every`-th one.

    Args:
        report: the `report.json` that promotes the challenger.

    Raises:
        BenchmarkError: the sealed benchmark cannot be used, or shares questions with the open one.
        MetricError: the gate's metric cannot score it, or failed.
        EngineError: the model cannot be loaded, crashed, or rejected a question.
    """
    sealed = loop_files.sealed_benchmark(loop)
    since = promotions_since_look(connect(), loop.name)
    if sealed is None or (since is not None and since + 1 < loop.evaluation.sealed_every):
        return None
    constraint = loop_files.constraint(loop)
    answers = answer_benchmark(
        challenger,
        sealed,
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        partial(on_progress, "challenger, sealed benchmark,"),
        constraint=constraint,
    ).answers
    counts = [scorer.count(question, answer.text) for question, answer in zip(sealed.questions, answers, strict=True)]
    judged_by = {
        "metric": loop.evaluation.metric.model_dump(mode="json"),
        "files": {name: sha256 for name, sha256 in loop_files.judging_files(loop).items() if name != "benchmark"},
        "decoding": [loop.evaluation.max_tokens, loop.evaluation.context, loop.system_prompt, constraint],
    }
    return SealedScores(
        sealed_sha256=sealed.sha256,
        benchmark_sha256=loop_files.benchmark(loop).sha256,
        settings_sha256=hash_of(judged_by),
        sealed_scores={
            question.id: (count.correct, count.total, question.cluster)
            for question, count in zip(sealed.questions, counts, strict=True)
        },
        open_scores=scores_by_question(report),
    )


def sealed_findings(db: Database, loop: str) -> dict[int, str]:
    """Return what each look at the sealed benchmark found, by the id of its promotion, oldest first."""
    looks = list_looks(db, loop)
    versions = {model.id: model.version for model in list_models(db, loop)}
    found = {look.deployment_id: "first look, so there is nothing to compare with yet" for look in looks[:1]}
    for before, now in pairwise(looks):
        since = versions.get(before.model_id, before.model_id[:16])
        found[now.deployment_id] = f"since {since}: {_finding(before, now)}"
    return found


def sealed_summary(loop: LoopSettings, db: Database) -> str:
    """Return what the newest look at the sealed benchmark found, and when it is asked next; empty without one."""
    found = list(sealed_findings(db, loop.name).values())[-1:]
    if loop.evaluation.sealed_benchmark is not None:
        since = promotions_since_look(db, loop.name)
        first_or_again, left = ("again", loop.evaluation.sealed_every - since) if since is not None else ("first", 1)
        found.append(f"promotions until it is asked {first_or_again}: {max(left, 1)}")
    return "; ".join(found)


def _finding(before: SealedLook, now: SealedLook) -> str:
    pairs = {
        "the sealed benchmark": (before.sealed_sha256, now.sealed_sha256),
        "the benchmark": (before.benchmark_sha256, now.benchmark_sha256),
        "the metric, the schema or how answers are decoded": (before.settings_sha256, now.settings_sha256),
    }
    changed = [name for name, (old, new) in pairs.items() if old != new]
    if changed:
        return f"not compared with the look before, because it changed: {', '.join(changed)}"
    return compare_gains(before.open_scores, now.open_scores, before.sealed_scores, now.sealed_scores).text
