"""Estimated and measured peak memory of training on a CPU: shapes, adapters, checkpointing, lengths.

Each row is a training process of two updates; its peak is VmHWM. The benchmark fails if an estimate is off by more than
20%; the constants to measure again are at the top of `finetune_pipeline/training/estimate.py`.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import publish
from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.architecture import read_architecture
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.estimate import ERROR, estimate_memory
from finetune_pipeline.training.job import JobConfig

STARTER = PROJECT_ROOT / "data" / "starter_model"
_SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
SHAPES = {
    "26M": _SMALL,
    "26M, 128k vocabulary": {**_SMALL, "vocab_size": 128_256},
    "152M": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16},
}
UPDATES = 2
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("starter", 60, {"per_device_train_batch_size": 24}),
    ("starter", 480, {"per_device_train_batch_size": 8}),
    ("starter", 480, {"per_device_train_batch_size": 8, "gradient_checkpointing": True}),
    ("26M", 60, {"per_device_train_batch_size": 8}),
    ("26M", 256, {"per_device_train_batch_size": 8}),
    ("26M", 256, {"per_device_train_batch_size": 8, "gradient_checkpointing": True}),
    ("26M", 256, {"per_device_train_batch_size": 8, "adapter": "qlora"}),
    ("26M", 256, {"per_device_train_batch_size": 8, "bf16": True}),
    ("26M", 256, {"per_device_train_batch_size": 8, "method": "dpo"}),
    ("26M", 256, {"per_device_train_batch_size": 8, "method": "kto"}),
    ("26M, 128k vocabulary", 256, {"per_device_train_batch_size": 8}),
    ("26M, 128k vocabulary", 256, {"per_device_train_batch_size": 2, "method": "dpo"}),
    ("152M", 60, {"per_device_train_batch_size": 2}),
    ("152M", 256, {"per_device_train_batch_size": 2}),
)


def main() -> None:
    """Measure every case."""
    with tempfile.TemporaryDirectory(prefix="finetune-memory-") as name:
        folder = Path(name)
        bases = {"starter": STARTER, **{shape: _model(folder / shape, SHAPES[shape]) for shape in SHAPES}}
        metrics = [_measure(folder, shape, bases[shape], tokens, settings) for shape, tokens, settings in CASES]
    rows = [
        [
            one["model"], one["adapter"], one["method"], "bfloat16" if one["bf16"] else "float32",
            "yes" if one["checkpointing"] else "no",
            f"{one['batch']} x {one['tokens']}", f"{one['estimate'] / 1e6:,.0f} MB",
            f"{one['measured'] / 1e6:,.0f} MB", f"{one['estimate'] / one['measured'] - 1:+.0%}",
        ]
        for one in metrics
    ]  # fmt: skip
    headings = [
        "model",
        "adapter",
        "method",
        "type",
        "checkpointing",
        "batch x tokens",
        "estimate",
        "measured",
        "off by",
    ]
    publish("memory", headings, rows, {"cases": metrics})
    if any(abs(one["estimate"] / one["measured"] - 1) > ERROR for one in metrics):
        sys.exit(f"an estimate is off by more than {ERROR:.0%}: measure the constants again")


def _measure(folder: Path, shape: str, base: Path, tokens: int, changes: dict[str, Any]) -> dict[str, Any]:
    settings = TrainingSettings.model_validate({"num_train_epochs": 1, "bf16": False, "save_steps": 500, **changes})
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    dataset = _dataset(folder / "dataset", tokens, settings.per_device_train_batch_size * UPDATES)
    job = JobConfig(
        base_model=base,
        dataset=dataset,
        preferences=folder / "preferences" if settings.method != "sft" else None,
        output=output,
        settings=settings,
    )
    result = train(job)
    architecture = read_architecture(base / "config.json", shape)
    estimate = estimate_memory(architecture, settings, "cpu", bf16=result.bf16, tokens=tokens)
    return {
        "model": shape, "adapter": settings.adapter, "method": settings.method, "bf16": result.bf16,
        "checkpointing": settings.gradient_checkpointing,
        "batch": settings.per_device_train_batch_size, "tokens": tokens, "estimate": estimate.bytes,
        "measured": result.peak_memory_bytes, "parts": {part.name: part.bytes for part in estimate.parts},
    }  # fmt: skip


def _model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a Llama with random weights and the starter model's tokenizer; return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    for path in [*STARTER.glob("tokenizer*"), *STARTER.glob("chat_template*")]:
        shutil.copy(path, folder)
    heads = {"num_key_value_heads": shape["num_attention_heads"] // 2, "tie_word_embeddings": True}
    words = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 5, "pad_token_id": 3}
    LlamaForCausalLM(LlamaConfig(**{**words, **heads, **shape})).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _dataset(folder: Path, tokens: int, count: int) -> Path:
    """Write examples of about `tokens` tokens (a digit is one, the chat template adds about 24), and `preferences`."""
    from datasets import Dataset, DatasetDict

    text = "7" * (tokens // 2 - 12)
    rows = [{"prompt": text, "history": [], "completion": text}] * count
    # For both DPO and KTO: each reads its own columns.
    rated = [{**row, "chosen": text, "rejected": text, "label": bool(n % 2)} for n, row in enumerate(rows)]
    empty = Dataset.from_dict({"prompt": [], "history": [], "completion": []})
    for path, examples in ((folder, rows), (folder.parent / "preferences", rated)):
        shutil.rmtree(path, ignore_errors=True)
        splits = DatasetDict({"train": Dataset.from_list(examples), "validation": empty})
        splits.save_to_disk(path, num_shards=dict.fromkeys(splits, 1))
    return folder


if __name__ == "__main__":
    main()
