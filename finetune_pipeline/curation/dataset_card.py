"""The card of a dataset version: what it is made of, in Markdown for people. Pure: plain values in, text out."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_pipeline.curation.dataset import Curated
from finetune_pipeline.curation.dataset_files import (
    PREFERENCE,
    PROMPT_COMPLETION,
    PROVENANCE_FILE,
    SPLITS,
    UNPAIRED_PREFERENCE,
    DatasetExample,
)

DATASET_CARD = "card.md"
SAMPLE = 20  # rows, or as many as there are sources
OF_EACH = 2  # rows of a source
_LONGEST = 400


@dataclass(frozen=True)
class DatasetCard:
    """All that a card tells.

    Attributes:
        loop, version: whose dataset it is, and which: the hash of inputs and settings.
        watermark: the last ingest offset of the logs that it was made from.
        inputs: name -> hash or version of what it was made from.
        settings: every setting that shaped it: filters, quotas, the split.
        packages: versions of the libraries that made it.
    """

    loop: str
    version: str
    watermark: int
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    packages: Mapping[str, str]
    curated: Curated


def dataset_card(card: DatasetCard) -> str:
    """Render a card; the same card gives the same text. No value of a secret is in it, only how many of each kind."""
    curated = card.curated
    held = {split: curated.count(PROMPT_COMPLETION, split) for split in SPLITS}
    title = f"# Dataset {cell(card.version)} of {cell(card.loop)}"
    lead = (
        f"{held['train'] + curated.replayed:,} examples to train on ({curated.replayed:,} of them replayed) and "
        f"{held['validation']:,} to validate. Which side a prompt is on follows from its hash and never changes. "
        "Secrets and personal data were replaced by placeholders before anything was written."
    )
    splits = {name: f"{rows:,}" for name, rows in _splits(curated).items()}
    parts = [
        title, lead, _sources(curated.sources), _table("Splits", ("part", "rows"), splits),
        _counts("Left out, and why", "reason", curated.left_out),
        _counts("Replaced by placeholders", "kind", curated.redacted),
        _table("Filters and settings", ("setting", "value"), {k: _shown(v) for k, v in card.settings.items()}),
        _table("Made from", ("what", "hash or version"), {**card.inputs, "events up to": card.watermark}),
        _table("Made with", ("package", "version"), card.packages), _sample(curated.sample(OF_EACH)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def sample(rows: Sequence[DatasetExample]) -> list[DatasetExample]:
    """The first row of every source, then a second of each, while it stays within SAMPLE."""
    by_source: dict[str, list[DatasetExample]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    turns = [found[place] for place in range(OF_EACH) for _, found in sorted(by_source.items()) if place < len(found)]
    return turns[: max(SAMPLE, len(by_source))]


def _splits(curated: Curated) -> dict[str, int]:
    return {
        "train": curated.count(PROMPT_COMPLETION, "train") + curated.replayed,
        "validation": curated.count(PROMPT_COMPLETION, "validation"),
        "pairs of a correction and the model's own answer (train)": curated.count(PREFERENCE, "train"),
        "answers found bad (train)": curated.count(UNPAIRED_PREFERENCE, "train"),
    }


def _sources(counts: Mapping[str, int]) -> str:
    """Where the examples come from."""
    total = sum(counts.values())
    lines = [f"| {cell(source)} | {count:,} | {count / total:.1%} |" for source, count in sorted(counts.items())]
    head = ["## Sources", "", "| source | examples | share |", "|---|---:|---:|"]
    return "\n".join([*head, *lines, "", f"Where each example came from: [{PROVENANCE_FILE}]({PROVENANCE_FILE})."])


def _counts(title: str, name: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return f"## {title}\n\nNothing."
    return _table(title, (name, "number"), {key: f"{count:,}" for key, count in counts.items()})


def _table(title: str, head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _sample(rows: Sequence[DatasetExample]) -> str:
    # One line of JSON each: whatever a text says, it cannot end the block that it stands in.
    lines = [json.dumps(_sampled(row), ensure_ascii=False) for row in sample(rows)]
    return "\n".join(["## Sample", "", "```json", *lines, "```"])


def _sampled(row: DatasetExample) -> dict[str, Any]:
    history = {"history": [{"role": t.role, "content": _cut(t.content)} for t in row.history]} if row.history else {}
    told = {
        "source": row.source,
        "provenance": row.provenance,
        **history,
        "prompt": row.prompt,
        "completion": row.completion,
    }
    return {name: _cut(value) if isinstance(value, str) else value for name, value in told.items()}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters)"


def _shown(value: Any) -> str:
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def cell(value: Any) -> str:
    """A value as it may stand in a cell of a Markdown table."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "(empty)"
