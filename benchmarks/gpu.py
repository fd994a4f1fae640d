"""Training on a GPU, or a tiny shape on the CPU: tokens per second, memory, and the fraction of the machine's peak.

Run by benchmarks/gpu.sh. Each row is a training run by this project (a JobConfig, in its own process) on a Llama with
random weights, since the cost of a step does not depend on their values. For comparison there is TRL's own recipe:
`SFTTrainer` with the defaults of `SFTConfig` over the same adapter (LoRA only: a 4-bit base is not a default).
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.results import publish
from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.hardware import peak_resident_bytes
from finetune_pipeline.training.job import JobConfig, Progress, TrainingError, TrainingResult

TOKENIZER = PROJECT_ROOT / "data" / "starter_model"
HEADINGS = ["model", "adapter", "backend", "tokens/s", "peak memory", "fraction of matmul peak"]

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """A Llama and how it is trained.

    Attributes:
        config: of the LlamaConfig.
        batch: per-device batch size.
        words: length of a completion; a word has about 5 tokens of the starter model's tokenizer.
        checkpointing: whether gradient checkpointing is on.
    """

    config: dict[str, Any]
    batch: int
    words: int
    checkpointing: bool = False


_LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "tiny": Shape(
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        batch=16,
        words=16,
    ),
    "1b": Shape(  # as Llama 3.2 1B
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
        batch=8,
        words=100,
    ),
    "8b": Shape(  # as Llama 3.1 8B
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "tie_word_embeddings": False,
        },
        batch=8,
        words=100,
        checkpointing=True,
    ),
}


def main() -> None:
    """Measure every shape, adapter and backend that can run here, and publish the table."""
    parser = argparse.ArgumentParser(description="Training on a GPU, or a tiny shape on the CPU.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 1b and 8b on a GPU, tiny on a CPU")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each training run")
    options = parser.parse_args()
    device = _apart(_device)
    names = options.shapes or (["tiny"] if device == "cpu" else ["1b", "8b"])
    peaks: dict[str, float] = {kind: _apart(_matmul_peak, kind) for kind in ("float32", "bfloat16")}
    metrics: list[dict[str, Any]] = []
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"finetune-gpu-{name}-"))
        try:
            metrics += _measure(name, folder, options.steps, peaks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    facts = {"device": device, "matmul_peak_tflops": {k: v / 1e12 for k, v in peaks.items()}, "steps": options.steps}
    publish("gpu", HEADINGS, [_row(found) for found in metrics], {**facts, "trainings": metrics})
    print(f"\n{device}; peak of a matrix product, TFLOP/s: {json.dumps(facts['matmul_peak_tflops'])}")
    if device == "cpu":
        print("There is no GPU that torch can use: the GPU part was not run.")


def _measure(name: str, folder: Path, steps: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Return the metrics of each training run of one shape, or why it was not run."""
    shape = SHAPES[name]
    flops = _apart(_make_model, shape, folder / "model")
    _apart(_make_dataset, shape, folder / "dataset", shape.batch * steps)
    found = []
    for adapter, backend in product(("lora", "qlora"), ("peft", "unsloth")):
        job = JobConfig(
            base_model=folder / "model",
            dataset=folder / "dataset",
            output=folder / f"{adapter}-{backend}",
            settings=_settings(shape, adapter, backend),
        )
        seen: list[Progress] = []
        try:
            metrics = _metrics(train(job, seen.append), seen, flops, peaks)
        except TrainingError as error:
            metrics = {"not_run": str(error).splitlines()[0]}
        found.append({"model": name, "adapter": adapter, "backend": backend, **metrics})
    plain = _apart(_plain_trl, shape, folder)
    plain["fraction_of_matmul_peak"] = plain["tokens_per_second"] * flops / peaks[plain.pop("type")]
    return [*found, {"model": name, "adapter": "lora", "backend": "plain TRL", **plain}]


def _plain_trl(shape: Shape, folder: Path) -> dict[str, Any]:
    """Train by TRL's recipe on the same examples; return tokens per second after the first steps, and peak memory."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "num_tokens" in logs and "loss" in logs:
                seen.append((time.monotonic(), logs["num_tokens"]))

    rows = load_from_disk(str(folder / "dataset"))["train"]
    chats = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        remove_columns=rows.column_names,
    )
    settings, gpu = _settings(shape, "lora", "peft"), torch.cuda.is_available()
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            output_dir=str(folder / "plain"),
            num_train_epochs=1,
            per_device_train_batch_size=shape.batch,
            max_length=2048,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not gpu,  # else its default of bfloat16 is rejected
        ),
        train_dataset=chats,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    (began, before), (ended, after) = seen[len(seen) // 4], seen[-1]
    return {
        "tokens_per_second": (after - before) / (ended - began),
        "peak_memory_bytes": torch.cuda.max_memory_reserved() if gpu else peak_resident_bytes(),
        "type": "bfloat16" if trainer.args.bf16 else "float32",
    }


def _settings(shape: Shape, adapter: str, backend: str) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {
            "backend": backend,
            "adapter": adapter,
            "num_train_epochs": 1,
            "per_device_train_batch_size": shape.batch,
            "max_length": 2048,
            "gradient_checkpointing": shape.checkpointing,
            "save_steps": 500,
        }
    )


def _metrics(result: TrainingResult, seen: list[Progress], flops: float, peaks: dict[str, float]) -> dict[str, Any]:
    """Return the metrics; tokens per second without the first steps, which compile kernels and fill caches."""
    speed = result.tokens_per_second
    later = [progress for progress in seen if progress.step >= progress.steps / 4]
    if len(later) > 1:
        first, last = later[0], later[-1]
        tokens = last.tokens_per_second * last.elapsed_seconds - first.tokens_per_second * first.elapsed_seconds
        speed = tokens / (last.elapsed_seconds - first.elapsed_seconds)
    peak = peaks["bfloat16" if result.bf16 else "float32"]
    return {
        "device": result.device,
        "bf16": result.bf16,
        "tokens_per_second": speed,
        "peak_memory_bytes": result.peak_memory_bytes,
        "fraction_of_matmul_peak": speed * flops / peak,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
    }


def _row(metrics: dict[str, Any]) -> list[str]:
    what = [metrics["model"], metrics["adapter"], metrics["backend"]]
    if "not_run" in metrics:
        return [*what, f"not run: {metrics['not_run']}", "", ""]
    memory = f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB"
    return [*what, f"{metrics['tokens_per_second']:,.0f}", memory, f"{metrics['fraction_of_matmul_peak']:.1%}"]


def _apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, so that its GPU memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _matmul_peak(kind: str) -> float:
    """Return the floating-point operations per second of a square matrix product, the best of several."""
    import torch

    gpu = torch.cuda.is_available()
    size, times = (8192, 20) if gpu else (2048, 5)
    a, b = (torch.randn(size, size, device="cuda" if gpu else "cpu").to(getattr(torch, kind)) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return float(2 * size**3 / best)


def _make_model(shape: Shape, folder: Path) -> float:
    """Write a model with random weights; return the operations of training it on one token.

    A frozen weight costs a multiplication and an addition forward, and the same backward for the activations, but has
    no gradient: 4 operations, where full training has 6. Causal attention costs 2 x layers x width x length forward and
    twice that backward. Recomputation by gradient checkpointing is not counted.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    gpu = torch.cuda.is_available()
    config = LlamaConfig(**shape.config, max_position_embeddings=2048, bos_token_id=1, eos_token_id=5, pad_token_id=3)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    weights = layers + config.vocab_size * config.hidden_size  # the output layer; the embedding is looked up
    length = shape.words * 5
    return float(4 * weights + 6 * config.num_hidden_layers * config.hidden_size * length)


def _make_dataset(shape: Shape, folder: Path, count: int) -> None:
    """Write examples of one length, as after grouping by length, with random words."""
    from datasets import Dataset, DatasetDict

    numbers = random.Random(0)
    rows = [
        {
            "prompt": f"wall of {index} mm",
            "history": [],
            "completion": " ".join(f"{numbers.randrange(1000):03d}," for _ in range(shape.words)),
        }
        for index in range(count)
    ]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder)


if __name__ == "__main__":
    main()
