"""The gate on unchanged retrains: how often it would promote a model that differs from the champion by its seed only.

The default loop trains on the same data with other seeds. Each retrain is compared with the first (real). Then
histories of twelve comparisons resample the questions of random pairs of retrains (simulated). Finished trainings are
kept under FINETUNE_HOME and reused, so that an interrupted run resumes.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from benchmarks.methods import LOOP, write_dataset
from benchmarks.results import publish
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION
from finetune_pipeline.evaluation.comparison import (
    Comparison,
    ModelResult,
    QuestionComparison,
    compare,
    judge,
    paired_scores,
    score_model,
)
from finetune_pipeline.evaluation.gate import BudgetState, QualityFloor, Verdict, decide
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.evaluation.significance import compare_slices, paired_test
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.export.model import export
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.settings import BUDGET_TESTS, GateSettings, LoopSettings, home, read_loop
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import JobConfig

SEEDS = range(11)
HISTORIES = 200
GATES = {
    "the rule of 5 % (default)": GateSettings(),
    "`significance: required`": GateSettings(significance="required"),
    "`slices: required`": GateSettings(slices="required"),
}
BUDGET = BudgetState(tested=True, left=0)


def main() -> None:
    """Train, compare and simulate."""
    loop = read_loop(LOOP)
    folder = home() / "benchmarks" / "burn_in"
    if not (folder / "data" / PROMPT_COMPLETION).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_dataset(loop, folder / "data", None)
    models = [_model(loop, seed, folder) for seed in SEEDS]
    benchmark, scorer = loop_files.benchmark(loop), loop_files.scorer(loop)
    real = [compare(benchmark, scorer, models[0], one) for one in models[1:]]
    pairs = [compare(benchmark, scorer, old, new) for old, new in permutations(models, 2)]
    results = {name: _count(real, gate) for name, gate in GATES.items()}
    all_pairs = {name: _count(pairs, gate) for name, gate in GATES.items()}
    histories = _simulate(pairs, GATES)
    rows = [
        [
            name,
            f"{results[name]['promote']} of {len(real)}",
            f"{all_pairs[name]['promote']} of {len(pairs)}",
            f"{histories[name]['comparisons_promoted']:.1%}",
            f"{histories[name]['histories_promoted']} of {HISTORIES}",
        ]
        for name in GATES
    ]
    headings = [
        "the gate",
        "real retrains promoted",
        "all ordered pairs",
        "simulated comparisons",
        f"simulated histories of {BUDGET_TESTS} with a promotion",
    ]
    scores = [{"seed": seed, "correct": one.totals.correct} for seed, one in zip(SEEDS, models, strict=True)]
    metrics: dict[str, Any] = {"total": models[0].totals.total, "questions": len(benchmark.questions), "models": scores}
    metrics |= {"differing": sum(_differing(one) for one in pairs) / len(pairs)}
    metrics |= {"real": results, "pairs": all_pairs, "simulated": histories}
    publish("burn_in", headings, rows, metrics)


def _model(loop: LoopSettings, seed: int, folder: Path) -> ModelResult:
    """Return the scores of the loop's model of this seed, which is trained unless an earlier run did."""
    output = folder / f"seed-{seed}"
    gguf = output / "gguf" / f"model-{loop.export.quantization}.gguf"
    base = resolve_base_model(loop.base_model)
    if not gguf.exists():
        job = JobConfig(
            base_model=base,
            dataset=folder / "data" / PROMPT_COMPLETION,
            system_prompt=loop.system_prompt,
            output=output,
            settings=loop.training.model_copy(update={"seed": seed, "method": "sft"}),
        )
        train(job)
        export(base, output / "adapter", output / "gguf", loop.export.quantization)
        print(f"trained with seed {seed}", flush=True)
    evaluation, benchmark = loop.evaluation, loop_files.benchmark(loop)
    spec = ModelSpec(gguf=gguf, context=evaluation.context, parallel=evaluation.parallel)
    constrained, free = (
        answer_benchmark(spec, asked, evaluation, loop.system_prompt, loop.name, constraint=schema)
        for asked, schema in ((benchmark, loop_files.constraint(loop)), (benchmark.sample, None))
    )
    return score_model(
        f"seed {seed}",
        constrained.model_sha256,
        constrained.size_bytes,
        constrained.answers,
        benchmark,
        loop_files.scorer(loop),
        unconstrained=free.answers,
    )


def _count(comparisons: Sequence[Comparison], gate: GateSettings) -> dict[str, int]:
    """Return how many comparisons get each decision."""
    decisions = Counter(judge(one, gate, BUDGET).decision for one in comparisons)
    return {decision: decisions[decision] for decision in ("promote", "reject", "inconclusive")}


def _differing(comparison: Comparison) -> float:
    """Return the fraction of questions in which the scores of both models differ."""
    return 1 - comparison.significance.ties / comparison.significance.questions


def _simulate(pairs: Sequence[Comparison], gates: dict[str, GateSettings]) -> dict[str, dict[str, float]]:
    """Return by gate how many simulated comparisons, and histories of twelve, would have promoted.

    Each comparison resamples the questions of a random ordered pair of retrains.
    """
    import numpy as np

    random = np.random.default_rng(0)
    promoted = {name: np.zeros((HISTORIES, BUDGET_TESTS), dtype=bool) for name in gates}
    for history in range(HISTORIES):
        for cycle in range(BUDGET_TESTS):
            pair = pairs[int(random.integers(len(pairs)))]
            asked = [pair.questions[index] for index in random.integers(len(pair.questions), size=len(pair.questions))]
            for name, verdict in _verdicts(asked, pair.quality_floor, gates).items():
                promoted[name][history, cycle] = verdict.promote
    return {
        name: {
            "comparisons_promoted": float(found.mean()),
            "histories_promoted": int(found.any(axis=1).sum()),
            "first_comparisons_promoted": int(found[:, 0].sum()),
        }
        for name, found in promoted.items()
    }


def _verdicts(
    asked: Sequence[QuestionComparison], floor: QualityFloor, gates: dict[str, GateSettings]
) -> dict[str, Verdict]:
    slices: dict[str, list[QuestionComparison]] = {}
    for one in asked:
        slices.setdefault(one.question.slice, []).append(one)
    paired, by_slice = paired_scores(asked), {name: paired_scores(members) for name, members in slices.items()}
    found = paired_test(paired)
    return {
        name: decide(
            sum(paired.champion),
            sum(paired.challenger),
            paired.total,
            floor,
            gate,
            found,
            compare_slices(by_slice, gate.slice_margin, gate.significance_level),
            BUDGET,
        )
        for name, gate in gates.items()
    }


if __name__ == "__main__":
    main()
