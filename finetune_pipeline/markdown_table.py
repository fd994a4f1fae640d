"""Markdown tables, for dataset cards, model cards, reports and metadata in Dagster's UI."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """Return a Markdown table.

    Args:
        headings: of the columns; may be empty strings.
        rows: the values of each row, escaped by `cell`.
        align: a letter for each column, l or r; all columns are left-aligned by default.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align or "l" * len(headings)]
    lines = [" | ".join(headings), *(" | ".join(map(cell, row)) for row in rows)]
    return "\n".join([f"| {lines[0]} |", f"|{'|'.join(rules)}|", *(f"| {line} |" for line in lines[1:])])


def cell(value: Any) -> str:
    """Return a value as text that cannot end its table cell or start HTML; integers get thousands separators."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
