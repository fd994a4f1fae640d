"""The model card of a version: Markdown with Hugging Face's front matter. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

from finetune_pipeline.markdown_table import markdown_table

MODEL_CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class ModelCard:
    """Content of a card. Unknown values are None or empty, and left out.

    Attributes:
        name: `loop@v1.2.0`.
        description: the task of the loop's model.
        mode: "full" or "incremental" training.
        mode_reason: what training started from.
        files: name of each model file -> its SHA-256.
        data: counts of the dataset, by display name.
        events: range of ingest offsets of the data, "1..480".
        watermark: the last ingest offset that training saw.
        training: metrics of the training, by display name.
        use: what was said about its answers in use, by display name.
        scores: this model's metrics by key, for the front matter; fractions are 0 to 1.
        metrics: the report's table: name, the replaced model's value, this model's value.
        benchmark_sha256: hash of the benchmark of both models.
        verdict: the reason of the gate's verdict.
    """

    name: str
    loop: str
    description: str
    created_at: datetime
    mode: str
    base_model: str
    base_hash: str
    files: Mapping[str, str]
    mode_reason: str = ""
    adapter: str | None = None
    dataset: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    events: str | None = None
    watermark: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    use: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    metrics: Sequence[tuple[str, str, str]] = ()
    benchmark_sha256: str | None = None
    verdict: str = ""


def render_model_card(card: ModelCard) -> str:
    """Return the card in Markdown; the same card gives the same text."""
    up_to = f"up to ingest offset {card.watermark}" if card.watermark is not None else None
    made_from = {
        "base model": f"{card.base_model} ({card.base_hash[:16]})",
        "adapter": card.adapter,
        "dataset": card.dataset,
        "events": card.events or up_to,
        "training": f"{card.mode}, {card.mode_reason}" if card.mode_reason else card.mode,
        "promoted": f"{card.created_at:%Y-%m-%d %H:%M} UTC",
        **{name: f"SHA-256 `{sha256}`" for name, sha256 in card.files.items()},
    }
    evaluation = [f"**Gate:** {_line(card.verdict)}"] if card.verdict else []
    if card.metrics:
        evaluation.append(markdown_table(["metric", "previous model", "this model"], card.metrics, "lrr"))
    if card.benchmark_sha256:
        evaluation.append(f"Both models answered the same questions, benchmark `{card.benchmark_sha256[:16]}`.")
    parts = [
        _front_matter(card),
        f"# {_line(card.name)}",
        _line(card.description),
        _section("Made from", {name: value for name, value in made_from.items() if value is not None}),
        "\n\n".join(["## Evaluation", *evaluation]) if evaluation else "",
        _section("Training data", card.data),
        _section("Training", card.training),
        _section("From use", card.use),
        "## Limits",
        f"- It was trained for one task, `{card.loop}`, with that loop's system prompt; other tasks were not tested.\n"
        "- Its metrics hold for its benchmark and for exactly these files, by hash; another quantization is another "
        "model.\n"
        "- Its answers can be wrong. It learned from what the application's users and validators accepted.\n"
        "- Its training data comes from use, and may contain the habits and gaps of its users.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: ModelCard) -> str:
    matter: dict[str, Any] = {
        "base_model": card.base_model,
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "lora", "finetune-pipeline", card.loop],
    }
    if card.scores:
        metrics = [{"type": key, "value": value} for key, value in card.scores.items()]
        dataset = {"name": f"benchmark of {card.loop}", "type": card.benchmark_sha256 or card.loop}
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
        matter |= {"metrics": list(card.scores), "model-index": [{"name": card.name, "results": [result]}]}
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _section(title: str, rows: Mapping[str, Any]) -> str:
    return f"## {title}\n\n{markdown_table(['', ''], rows.items())}" if rows else ""


def _line(text: str) -> str:
    return " ".join(text.split())
