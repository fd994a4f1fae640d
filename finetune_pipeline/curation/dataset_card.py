"""The card of a dataset: what it is made of, in Markdown for people."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_pipeline.curation.dataset_files import (
    PREFERENCE,
    PROMPT_COMPLETION,
    PROVENANCE_FILE,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    DatasetSummary,
)
from finetune_pipeline.markdown_table import cell, markdown_table
from finetune_pipeline.wording import counted

SAMPLE_HEADING = "## Sample"
"""Heading of the last section, the only one with prompts and completions."""
SAMPLE_ROWS = 20  # or one for each source, if there are more sources
SAMPLE_ROWS_OF_SOURCE = 2
_MAX_CHARS = 400


def dataset_card(
    loop: str,
    version: str,
    summary: DatasetSummary,
    *,
    watermark: int,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    packages: Mapping[str, str],
) -> str:
    """Return the card as Markdown. Secrets are counted by kind and never shown.

    Args:
        watermark: the last ingest offset of the logs that the dataset was built from.
        inputs: name -> hash or version of what it was built from.
        settings: every setting that shaped it: filters, quotas, the split.
        packages: versions of the libraries that built it.
    """
    examples = summary.rows[PROMPT_COMPLETION]
    rows = {
        "train": examples["train"] + summary.replayed,
        "validation": examples["validation"],
        "preference pairs (train)": summary.rows[PREFERENCE]["train"],
        "undesirable completions (train)": summary.rows[UNPAIRED_PREFERENCE]["train"],
    }
    total = sum(summary.sources.values())
    sources = [(source, count, f"{count / total:.1%}") for source, count in sorted(summary.sources.items())]
    # One line of JSON for each example: no text can end the code block.
    lines = [json.dumps(_shortened(example), ensure_ascii=False) for example in card_sample(summary.sample)]
    return "\n\n".join(
        [
            f"# Dataset {cell(version)} of {cell(loop)}",
            f"{counted(examples['train'], 'training example')} + {summary.replayed:,} replay, and "
            f"{counted(rows['validation'], 'validation example')}. The hash of a prompt decides its split, which never "
            "changes. Secrets and personal data were replaced by placeholders before anything was written.",
            "## Sources",
            markdown_table(["source", "examples", "fraction"], sources, "lrr"),
            *([_implicit(summary.implicit)] if summary.implicit else []),
            f"`{PROVENANCE_FILE}` says where each example came from.",
            "## Splits",
            markdown_table(["part", "rows"], rows.items()),
            "## Left out, and why",
            _counts("reason", summary.left_out),
            "## Replaced by placeholders",
            _counts("kind", summary.redacted),
            "## Filters and settings",
            markdown_table(["setting", "value"], [(name, _setting(value)) for name, value in settings.items()]),
            "## Built from",
            markdown_table(["input", "hash or version"], {**inputs, "watermark": watermark}.items()),
            "## Built with",
            markdown_table(["package", "version"], packages.items()),
            SAMPLE_HEADING,
            "\n".join(["```json", *lines, "```"]) + "\n",
        ]
    )


def card_sample(examples: Sequence[DatasetExample]) -> list[DatasetExample]:
    """Return the first example of every source, then a second of each, up to SAMPLE_ROWS."""
    by_source: dict[str, list[DatasetExample]] = defaultdict(list)
    for example in examples:
        by_source[example.source].append(example)
    in_turn = [
        found[position]
        for position in range(SAMPLE_ROWS_OF_SOURCE)
        for _, found in sorted(by_source.items())
        if position < len(found)
    ]
    return in_turn[: max(SAMPLE_ROWS, len(by_source))]


def _implicit(count: int) -> str:
    verb = "was" if count == 1 else "were"
    return f"Of these, {counted(count, 'answer')} {verb} accepted because nobody objected (implicit acceptance)."


def _counts(heading: str, counts: Mapping[str, int]) -> str:
    return markdown_table([heading, "number"], counts.items()) if counts else "Nothing."


def _shortened(example: DatasetExample) -> dict[str, Any]:
    fields: dict[str, Any] = {"source": example.source, "provenance": example.provenance}
    if example.history:
        fields["history"] = [{"role": turn.role, "content": _shorten(turn.content)} for turn in example.history]
    fields |= {"prompt": example.prompt, "completion": example.completion}
    return {name: _shorten(value) if isinstance(value, str) else value for name, value in fields.items()}


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ... ({len(text):,} characters)"


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _shorten(text) if text.strip() else "(empty)"
