"""SFT, DPO and KTO on the sample logs: correct parameters of the benchmark, by the F16 GGUF. Takes half an hour.

Each method trains on everything that the logs hold for it, and on logs with fewer corrections, whose other corrected
answers are only known to be undesirable. Learning rates were tuned beforehand: for sft with the loop, for dpo between
1e-3 and 2e-3, for kto between 3e-4 and 1e-3. Finished runs are kept under FINETUNE_HOME and reused.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import publish
from finetune_pipeline.curation.dataset import curate
from finetune_pipeline.curation.dataset_files import PREFERENCE, PROMPT_COMPLETION, UNPAIRED_PREFERENCE
from finetune_pipeline.curation.snapshot import COLUMNS, Shard, Snapshot, example_of, row_of, schema
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.export.model import F16, export
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.train import DATASET_TYPES
from finetune_pipeline.records import Example
from finetune_pipeline.settings import DEFS_FOLDER, LoopSettings, home, read_loop
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import JobConfig, TrainingResult

LOOP = DEFS_FOLDER / "aec_parser" / "defs.yaml"
CORRECTIONS = {"thumbs": 0, "fewest": 8, "few": 24, "all": None}
"""Number of answers in the logs that stay corrected; the others are undesirable. Without any correction, the desirable
completions are the answers that people approved unchanged."""


@dataclass(frozen=True)
class Case:
    """One training: its data, and the settings that differ from the loop's YAML."""

    data: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder name of the case."""
        return "-".join([self.data, self.name, *(f"{key}={value}" for key, value in self.settings.items())])


# dpo has fewer examples than sft (no replay data); with few of them it gets more epochs, for as many updates.
CASES = [
    Case("thumbs", "sft", {"learning_rate": 2e-3}),
    Case("thumbs", "kto", {"method": "kto", "learning_rate": 3e-4}),
    Case("fewest", "sft", {"learning_rate": 2e-3, "num_train_epochs": 12}),
    Case("fewest", "kto", {"method": "kto", "learning_rate": 3e-4}),
    Case("few", "sft", {"learning_rate": 2e-3, "num_train_epochs": 12}),
    Case("few", "dpo", {"method": "dpo", "learning_rate": 2e-3, "num_train_epochs": 24}),
    Case("few", "kto", {"method": "kto", "learning_rate": 3e-4}),
    Case("all", "sft", {"learning_rate": 2e-3}),
    Case("all", "dpo", {"method": "dpo", "learning_rate": 1e-3}),
]


def main() -> None:
    """Train and measure every case."""
    loop = read_loop(LOOP)
    folder = home() / "benchmarks" / "methods"
    held = {
        name: write_dataset(loop, folder / f"data-{name}", corrections) for name, corrections in CORRECTIONS.items()
    }
    base = _measure(loop, export(resolve_base_model(loop.base_model), None, folder / "base", F16).f16)
    cases = [_run(loop, case, folder) for case in CASES]
    rows = [["", "the base model", "", "", "", *_cells(base)], *(_row(case) for case in cases)]
    headings = [
        "data",
        "method",
        "learning rate",
        "steps",
        "loss after",
        "all",
        "firm's wording",
        "plain wording",
        "valid",
    ]
    publish("methods", headings, rows, {"data": held, "base": base, "cases": cases})


def write_dataset(loop: LoopSettings, folder: Path, corrections: int | None) -> dict[str, int]:
    """Build the dataset of the sample logs; with `corrections`, of that many of them and of all undesirable answers."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    database = connect()
    ingest(loop, database, print)
    logs, _ = snapshot(loop, database)
    rows = Snapshot([Shard(logs.path / shard) for shard in logs.manifest.shards])
    current = rows.take(np.flatnonzero(~rows.superseded()), COLUMNS).to_pylist()
    examples = [example_of(row) for row in current if row["target"] is not None]
    if corrections is not None:
        examples = _few(examples, corrections)
    shard = folder.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist([row_of(example) for example in examples], schema()), shard)
    summary = curate(
        folder,
        [shard],
        loop_files.replay(loop).examples,
        loop_files.policy(loop),
        loop_files.identity,
        system_prompt=loop.system_prompt,
    )
    return {
        "good": summary.rows[PROMPT_COMPLETION]["train"],
        "replayed": summary.replayed,
        "pairs": summary.rows[PREFERENCE]["train"],
        "bad": summary.rows[UNPAIRED_PREFERENCE]["train"],
    }


def _few(examples: list[Example], corrections: int) -> list[Example]:
    """Keep this many corrections (or, for none, approved answers), and turn the others into undesirable answers."""
    corrected = sorted((e for e in examples if e.corrected), key=lambda example: str(example.interaction_id))
    changes = {"corrected": False, "confirmed": False, "reward": -1.0}
    wrong = [e.model_copy(update={**changes, "target": e.output}) for e in corrected[corrections:]]
    good = corrected[:corrections] or [e for e in examples if e.reward > 0 and not e.corrected]
    return [*good, *wrong, *(example for example in examples if example.reward < 0)]


def _run(loop: LoopSettings, case: Case, folder: Path) -> dict[str, Any]:
    data, output = folder / f"data-{case.data}", folder / case.folder
    settings = type(loop.training).model_validate(loop.training.model_dump() | case.settings)
    part = DATASET_TYPES[settings.method]
    job = JobConfig(
        base_model=resolve_base_model(loop.base_model),
        dataset=data / PROMPT_COMPLETION,
        preferences=None if part == PROMPT_COMPLETION else data / part,
        system_prompt=loop.system_prompt,
        output=output,
        settings=settings,
    )
    result = train(job)
    model = export(job.base_model, output / "adapter", output / "gguf", F16)
    measured = _measure(loop, model.f16)
    print(case.folder, measured, flush=True)
    return {"data": case.data, "name": case.name, **case.settings, **_metrics(result), **measured}


def _metrics(result: TrainingResult) -> dict[str, Any]:
    return result.model_dump(include={"steps", "examples", "loss_before", "loss_after"})


def _measure(loop: LoopSettings, gguf: Path) -> dict[str, float]:
    """Return the fractions of correct parameters by wording, and of valid answers."""
    benchmark, evaluation = loop_files.benchmark(loop), loop.evaluation
    scorer = loop_files.scorer(loop)
    spec = ModelSpec(gguf=gguf, context=evaluation.context, parallel=evaluation.parallel)
    # Without constrained decoding, so that the methods can be compared by how many answers are valid.
    answers = answer_benchmark(spec, benchmark, evaluation, loop.system_prompt, loop.name).answers
    scores = [
        scorer.score(question, answer.text) for question, answer in zip(benchmark.questions, answers, strict=True)
    ]
    fractions = {}
    for wording in ("all", "firm", "plain"):
        asked = [s for s, q in zip(scores, benchmark.questions, strict=True) if wording in {"all", q.wording}]
        fractions[wording] = sum(s.correct for s in asked) / sum(s.total for s in asked)
    return {**fractions, "valid": sum(s.valid for s in scores) / len(scores)}


def _row(case: dict[str, Any]) -> list[Any]:
    return [
        case["data"],
        case["name"],
        case["learning_rate"],
        case["steps"],
        f"{case['loss_after']:.3f}",
        *_cells(case),
    ]


def _cells(measured: dict[str, Any]) -> list[str]:
    return [f"{measured[name]:.1%}" for name in ("all", "firm", "plain", "valid")]


if __name__ == "__main__":
    main()
