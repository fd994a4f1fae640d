"""The model card of a version: Markdown with Hugging Face's front matter. Pure: plain values in, text out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

MODEL_CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class CardMetric:
    """One metric of the report, as people read it."""

    name: str
    champion: str
    challenger: str


@dataclass(frozen=True)
class Card:
    """All that a card tells. What is not known is None or empty, and left out.

    Attributes:
        name: `loop@v1.2.0`.
        description: what the loop's model does.
        mode: "full" or "incremental" training.
        mode_reason: what it started from, and on top of which version.
        files: name of each model file -> its SHA-256.
        data: figures of the dataset, by the name to show.
        events: the ingest sequences that the data comes from, "1..480".
        watermark: the last of them that the training saw.
        training: figures of the training, by the name to show.
        scores: this model's figures by key, for the front matter; shares are 0 to 1.
        metrics: the report's table, this model against the one that it replaced.
        benchmark_sha256: hash of the questions that both were asked.
        verdict: the gate's sentence.
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
    scores: Mapping[str, float] = field(default_factory=dict)
    metrics: Sequence[CardMetric] = ()
    benchmark_sha256: str | None = None
    verdict: str = ""


def model_card(card: Card) -> str:
    """Render a card; the same card gives the same text."""
    parts = [_front_matter(card), f"# {_line(card.name)}", _line(card.description), _made_from(card)]
    parts += [_evaluation(card), _table("Training data", card.data), _table("Training", card.training), _limits(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card) -> str:
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


def _made_from(card: Card) -> str:
    up_to = f"up to ingest_offset {card.watermark}" if card.watermark is not None else None
    rows = {
        "base model": f"{card.base_model} ({card.base_hash[:16]})",
        "adapter": card.adapter,
        "dataset": card.dataset,
        "events": card.events or up_to,
        "training": f"{card.mode}, {card.mode_reason}" if card.mode_reason else card.mode,
        "promoted": f"{card.created_at:%Y-%m-%d %H:%M} UTC",
        **{name: f"SHA-256 `{sha256}`" for name, sha256 in card.files.items()},
    }
    return _table("Made from", {name: value for name, value in rows.items() if value is not None})


def _evaluation(card: Card) -> str:
    parts = [f"**Gate:** {_line(card.verdict)}"] if card.verdict else []
    if card.metrics:
        rows = [f"| {_cell(row.name)} | {_cell(row.champion)} | {_cell(row.challenger)} |" for row in card.metrics]
        parts.append("\n".join(["| metric | served before | this model |", "|---|---:|---:|", *rows]))
    if card.benchmark_sha256:
        parts.append(f"Both models were asked the same questions, benchmark `{card.benchmark_sha256[:16]}`.")
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _limits(card: Card) -> str:
    return "\n".join(
        [
            "## Limits",
            "",
            f"- It was trained for one task, `{card.loop}`, with that loop's system prompt; of other tasks nothing is "
            "known.",
            "- Its figures hold for its benchmark and for exactly these files, by hash; another quantization is "
            "another model.",
            "- Its answers can be wrong. What it learned is what the application's users and validators found good.",
            "- Its training data comes from use and may carry the habits and gaps of those who used it.",
        ]
    )


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())
