"""Publish the results of a benchmark: a Markdown table on the screen, JSON in a file."""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent / "results"


def end(missed: list[str]) -> None:
    """Exit with an error if a target was missed. Call it after `publish`."""
    if missed:
        sys.exit("missed targets: " + "; ".join(missed))


def publish(name: str, headings: list[str], rows: list[list[Any]], metrics: dict[str, Any]) -> None:
    """Print the table, and write the metrics with a description of this machine."""
    print(f"\n## {name}\n")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    machine: dict[str, Any] = {"cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    machine |= {"system": platform.system(), "python": platform.python_version()}
    FOLDER.mkdir(exist_ok=True)
    document = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, **metrics}
    (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
