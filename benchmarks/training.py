"""SFT of the starter model, compared with the plain recipe of TRL's documentation.

All recipes train in fresh processes on the default loop's data (sample logs and replay data), for the same number of
epochs and in the same environment. `trl` is `SFTTrainer` with the defaults of `SFTConfig` (batch 8, gradient
checkpointing) and of `LoraConfig()` (rank 8 on query and value, a smaller adapter than the loop's). `ours` is this
project's trainer with the default loop's settings (batch 24). A larger adapter and smaller batches learn more in so few
steps, so each recipe has a counterpart: `trl, our adapter` trains the loop's adapter, and `ours, batch 8` uses TRL's
batch. Each recipe uses the learning rate of a small grid that gives it the lowest validation loss in bfloat16, as the
mean of three seeds; seeds change the loss more than most settings do.

tokens per second   without padding, over the time of the training loop; by CPU time it varies less on a busy machine
validation loss     mean per completion token, of the saved adapter in float32, by the same code for all recipes
fraction of peak    (4 x weights of the layers' matrices + 6 x weights of the adapter) x tokens + 4 x output matrix x
                    completion tokens, divided by the time and by the rate of a 2048 x 2048 matrix product. This is the
                    work that the mathematics needs: frozen weights have no gradient, and recomputation does not count.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import publish
from finetune_pipeline.settings import PROJECT_ROOT

EPOCHS = 2
SEEDS = (0, 1, 2)
RATES = {
    "ours": (4e-3, 6e-3),
    "trl": (5e-3, 1e-2),
    "ours, batch 8": (3e-3, 4e-3),
    "trl, our adapter": (3e-3, 4e-3),
}
BATCHES = {"ours, batch 8": 8}
PEERS = {"ours": "trl", "ours, batch 8": "trl, our adapter"}
AIMS = {"bfloat16": 2.0, "float32": 1.4}
PRODUCT = 2048
BASE = PROJECT_ROOT / "data" / "starter_model"


def main() -> None:
    """Choose the learning rates, then measure the recipes in turn."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as home:
        os.environ |= {"FINETUNE_HOME": home, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        dataset = _dataset()
        peak = _in_a_process("peak")
        # In turn, so that other load on the machine affects all of them.
        tried: dict[str, dict[float, list[dict[str, float]]]] = {
            recipe: {rate: [] for rate in rates} for recipe, rates in RATES.items()
        }
        for seed in SEEDS:
            for recipe, rates in RATES.items():
                for rate in rates:
                    tried[recipe][rate].append(
                        _in_a_process("train", recipe, "bfloat16", str(rate), str(seed), dataset)
                    )
        tuning = {recipe: {rate: _mean_loss(runs) for rate, runs in rates.items()} for recipe, rates in tried.items()}
        chosen = {recipe: min(losses, key=lambda rate: losses[rate]) for recipe, losses in tuning.items()}
        runs = {"bfloat16": {recipe: tried[recipe][rate] for recipe, rate in chosen.items()}}
        runs["float32"] = {recipe: [] for recipe in chosen}
        for seed in SEEDS:
            for recipe, rate in chosen.items():
                runs["float32"][recipe].append(_in_a_process("train", recipe, "float32", str(rate), str(seed), dataset))
    _publish(runs, peak, tuning, chosen)


def _mean_loss(runs: list[dict[str, float]]) -> float:
    return statistics.mean(run["loss"] for run in runs)


def _publish(runs: Any, peak: dict[str, float], tuning: Any, chosen: dict[str, float]) -> None:
    rows, medians = [], {}
    for kind, aim in AIMS.items():
        median = {
            recipe: {name: statistics.median(run[name] for run in each) for name in each[0]}
            | {"loss": _mean_loss(each)}
            for recipe, each in runs[kind].items()
        }
        medians[kind] = median
        for recipe, own in median.items():
            fraction = own["flops"] * own["per_second"] / own["tokens"] / peak[kind]
            ahead = ""
            if recipe in PEERS:
                wall, cpu = (own[name] / median[PEERS[recipe]][name] for name in ("per_second", "per_cpu_second"))
                ahead = f"{wall:.2f}x {PEERS[recipe]} ({cpu:.2f}x by CPU time), aim {aim}x"
            rows.append(
                [
                    kind, recipe, f"{chosen[recipe]:g}", f"{own['loss']:.4f}", f"{own['per_second']:,.0f}",
                    f"{own['per_cpu_second']:,.0f}", f"{fraction:.0%} of {peak[kind] / 1e9:.0f} GFLOP/s", ahead,
                ]
            )  # fmt: skip
    headings = [
        "",
        "recipe",
        "learning rate",
        "validation loss",
        "tokens/s",
        "by CPU second",
        "fraction of peak",
        "speed",
    ]
    metrics = {"epochs": EPOCHS, "peak_flops": peak, "tuning": tuning, "medians": medians, "runs": runs}
    publish("training", headings, rows, metrics)
    missed = [*_missed(medians, runs)]
    if missed:
        sys.exit("\n".join(missed))


def _missed(medians: Any, runs: Any) -> Iterator[str]:
    """Yield the goals that were missed: the speed of the plain recipe, and the loss of the counterpart.

    Seeds change the loss: it counts as higher from two standard errors of the difference of the means on.
    """
    for kind, aim in AIMS.items():
        for recipe, peer in PEERS.items():
            own, other = medians[kind][recipe], medians[kind][peer]
            if recipe == "ours" and own["per_second"] < aim * other["per_second"]:
                yield f"{kind}: {own['per_second'] / other['per_second']:.2f} times {peer}'s speed, aim {aim}"
            losses = [[run["loss"] for run in runs[kind][name]] for name in (recipe, peer)]
            error = math.sqrt(sum(statistics.variance(each) / len(each) for each in losses))
            if own["loss"] > other["loss"] + 2 * error:
                yield f"{kind}: validation loss of {recipe} {own['loss']:.4f}, of {peer} {other['loss']:.4f}"


def _dataset() -> str:
    """Make the default loop's dataset from the sample logs; return its folder."""
    command = ["-m", "dagster", "asset", "materialize", "--select", "raw_logs,curated_dataset"]
    env = {**os.environ, "DAGSTER_HOME": os.environ["FINETUNE_HOME"]}
    subprocess.run(
        [sys.executable, *command, "-m", "finetune_pipeline.definitions"], check=True, env=env, capture_output=True
    )
    (folder,) = Path(os.environ["FINETUNE_HOME"]).glob("artifacts/aec_parser/curated_dataset/*/prompt_completion")
    return str(folder)


def _in_a_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.training", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{ran.stderr[-3000:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    print(arguments[:5], found, file=sys.stderr)
    return found


def peak() -> dict[str, float]:
    """Return the operations per second of the fastest of five matrix products, for each type."""
    import torch

    rates = {}
    for kind in AIMS:
        one, other = (torch.randn(PRODUCT, PRODUCT).to(getattr(torch, kind)) for _ in range(2))
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            one @ other
            seconds.append(time.perf_counter() - began)
        rates[kind] = 2 * PRODUCT**3 / min(seconds[1:])
    return rates


def train(recipe: str, kind: str, rate: str, seed: str, dataset: str) -> dict[str, float]:
    """Train once; return its tokens, its time, and the validation loss of the adapter."""
    from transformers import set_seed

    from finetune_pipeline.inference.tokenizer import load_tokenizer
    from finetune_pipeline.settings import load_loop
    from finetune_pipeline.training.conversations import IGNORE_INDEX
    from finetune_pipeline.training.job import JobConfig
    from finetune_pipeline.training.tokenized_data import load_data

    output = Path(tempfile.mkdtemp(prefix="training-", dir=os.environ["FINETUNE_HOME"]))
    settings = load_loop("aec_parser").training
    changes = {"learning_rate": float(rate), "num_train_epochs": EPOCHS, "bf16": kind == "bfloat16", "seed": int(seed)}
    settings = settings.model_copy(
        update={**changes, "per_device_train_batch_size": BATCHES.get(recipe, settings.per_device_train_batch_size)}
    )
    job = JobConfig(base_model=BASE, dataset=Path(dataset), output=output, settings=settings)
    set_seed(settings.seed)  # of the adapter's initial weights
    data = load_data(job, load_tokenizer(BASE))
    tokens = EPOCHS * sum(data.train["length"])
    completion_tokens = EPOCHS * sum(label != IGNORE_INDEX for labels in data.train["labels"] for label in labels)
    seconds, cpu = _ours(job, data) if recipe.startswith("ours") else _trl(job, recipe)
    loss, layers, adapter, output_matrix = _evaluate(output / "adapter", data.validation)
    flops = (4 * layers + 6 * adapter) * tokens + 4 * output_matrix * completion_tokens
    shutil.rmtree(output)
    metrics = {"seconds": seconds, "per_second": tokens / seconds, "per_cpu_second": tokens / cpu}
    return {"loss": loss, "tokens": tokens, "flops": flops, **metrics}


def _ours(job: Any, data: Any) -> tuple[float, float]:
    """Train by this project's trainer; return the wall and CPU seconds of its training loop."""
    from finetune_pipeline.inference.tokenizer import load_tokenizer
    from finetune_pipeline.training import trainer as own
    from finetune_pipeline.training.hardware import bf16_is_faster
    from finetune_pipeline.training.model import save_adapter

    bf16 = job.settings.bf16 and bf16_is_faster(job.settings.per_device_train_batch_size)
    steps = own.count_steps(len(data.train), job.settings)
    trainer = own.make_trainer(job, job.settings, data, load_tokenizer(job.base_model), steps, bf16)
    seconds = _timed(trainer)
    save_adapter(trainer.model, job)
    return seconds


def _trl(job: Any, recipe: str) -> tuple[float, float]:
    """Train by TRL's documented recipe: a model by its path, a dataset of chats, and defaults."""
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_from_disk(str(job.dataset / "train"))
    chats = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        remove_columns=rows.column_names,
        keep_in_memory=True,
    )
    settings = job.settings
    loops = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear")
    trainer = SFTTrainer(
        model=str(BASE),
        args=SFTConfig(
            output_dir=str(job.output),
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.num_train_epochs,
            bf16=settings.bf16,
            seed=settings.seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=chats,
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraConfig() if recipe == "trl" else loops,
    )
    seconds = _timed(trainer)
    trainer.model.save_pretrained(job.output / "adapter")
    return seconds


def _timed(trainer: Any) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return time.perf_counter() - began, time.process_time() - cpu


def _evaluate(adapter: Path, rows: Any) -> tuple[float, int, int, int]:
    """Return the mean loss per completion token in float32, and the weights of layers, adapter and output."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune_pipeline.training.conversations import IGNORE_INDEX

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    output = base.get_output_embeddings().weight.numel()
    layers = sum(part.weight.numel() for part in base.model.modules() if isinstance(part, torch.nn.Linear))
    model = PeftModel.from_pretrained(base, adapter).eval()
    extra = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    total, counted = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(
                torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            )
            counted += int((labels != IGNORE_INDEX).sum())
    return total / counted, layers, extra, output


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        run: dict[str, Callable[..., Any]] = {"peak": peak, "train": train}
        print(json.dumps(run[sys.argv[1]](*sys.argv[2:])))
