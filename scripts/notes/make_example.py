"""Makes the data of the second loop, `examples/meeting_notes/`: a note in, a summary line out, free text.

The notes come from templates with a fixed seed. What the model in service answered is what the base model really
answered; what a person corrected it to is the template's summary. The benchmark has names, things and days in
combinations that the logs do not have.

    .venv/bin/python scripts/notes/make_example.py
"""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid5

from finetune_pipeline.cli.ask import answers
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.settings import PROJECT_ROOT, read_loop

FOLDER = PROJECT_ROOT / "examples" / "meeting_notes"
NAMESPACE = UUID("6d656574-696e-4f67-8e6f-746573000000")
LOGGED, ASKED = 90, 30

NAMES = ["Meyer", "Okafor", "Lind", "Santos", "Keller", "Haddad", "Novak", "Brandt"]
THINGS = ["report", "drawings", "offer", "invoice", "schedule", "samples", "permit", "plan"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
NOTES = [
    "Call with {name} today. The {thing} has to be ready by {day}, everything else can wait.",
    "Met {name} at the site. We agreed that the {thing} goes out on {day}.",
    "{name} asked about the {thing} again and wants to see it by {day} at the latest.",
    "Long talk with {name} about the weather and the {thing}. Due {day}.",
]
SUMMARY = "{name}: {thing} by {day}"


def main() -> None:
    """Write the benchmark and the logs."""
    chosen = random.Random(11).sample(
        [(name, thing, day, note) for name in NAMES for thing in THINGS for day in DAYS for note in NOTES],
        LOGGED + ASKED,
    )
    pairs = [
        (note.format(name=name, thing=thing, day=day), SUMMARY.format(name=name, thing=thing, day=day))
        for name, thing, day, note in chosen
    ]
    _write(FOLDER / "benchmark.jsonl", [_question(number, *pair) for number, pair in enumerate(pairs[:ASKED])])
    _write(FOLDER / "logs" / "sample.jsonl", _events(pairs[ASKED:]))


def _question(number: int, note: str, summary: str) -> dict[str, str]:
    return {"id": f"note-{number:02d}", "slice": summary.split()[-1].lower(), "prompt": note, "expected": summary}


def _events(pairs: list[tuple[str, str]]) -> list[dict[str, object]]:
    loop = read_loop(FOLDER / "defs.yaml")
    outputs = answers(loop, base_gguf(loop, print), *(note for note, _ in pairs))
    events: list[dict[str, object]] = []
    for number, ((note, summary), output) in enumerate(zip(pairs, outputs, strict=True)):
        at = datetime(2026, 1, 5, 9, tzinfo=UTC) + timedelta(minutes=7 * number)
        asked = str(uuid5(NAMESPACE, f"interaction {number}"))
        common = {"loop": loop.name, "created_at": at.isoformat()}
        events.append({"event": "interaction", "id": asked, **common, "prompt": note, "output": output})
        given = {"event": "feedback", "id": str(uuid5(NAMESPACE, f"feedback {number}")), **common}
        events.append({**given, "interaction_id": asked, "kind": "correction", "correction": summary})
    return events


def _write(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
