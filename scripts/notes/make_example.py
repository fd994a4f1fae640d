"""Write the data of the example loop `examples/meeting_notes/`: each prompt is a note, each answer a summary line.

The notes come from templates with a fixed seed. The logged answers are the base model's own, and each correction is the
template's summary. The benchmark has combinations of name, thing and day that are not in the logs.

    .venv/bin/python scripts/notes/make_example.py
"""

import json
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid5

from finetune_pipeline.pipeline.ask import find_model, generate_answers
from finetune_pipeline.settings import PROJECT_ROOT, read_loop

FOLDER = PROJECT_ROOT / "examples" / "meeting_notes"
NAMESPACE = UUID("6d656574-696e-4f67-8e6f-746573000000")
LOGGED, QUESTIONS = 90, 30

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
        LOGGED + QUESTIONS,
    )
    pairs = [
        (note.format(name=name, thing=thing, day=day), SUMMARY.format(name=name, thing=thing, day=day))
        for name, thing, day, note in chosen
    ]
    questions = [
        {"id": f"note-{number:02d}", "slice": summary.split()[-1].lower(), "prompt": note, "expected": summary}
        for number, (note, summary) in enumerate(pairs[:QUESTIONS])
    ]
    _write(FOLDER / "benchmark.jsonl", questions)
    _write(FOLDER / "logs" / "sample.jsonl", _events(pairs[QUESTIONS:]))


def _events(pairs: list[tuple[str, str]]) -> list[dict[str, object]]:
    loop = read_loop(FOLDER / "defs.yaml")
    _, base = find_model(loop, "base", print)
    outputs = generate_answers(loop, base, *(note for note, _ in pairs))
    events: list[dict[str, object]] = []
    for number, ((note, summary), output) in enumerate(zip(pairs, outputs, strict=True)):
        at = datetime(2026, 1, 5, 9, tzinfo=UTC) + timedelta(minutes=7 * number)
        interaction_id = str(uuid5(NAMESPACE, f"interaction {number}"))
        common = {"loop": loop.name, "created_at": at.isoformat()}
        events.append({"event": "interaction", "id": interaction_id, **common, "prompt": note, "output": output})
        feedback = {"event": "feedback", "id": str(uuid5(NAMESPACE, f"feedback {number}")), **common}
        events.append({**feedback, "interaction_id": interaction_id, "kind": "correction", "correction": summary})
    return events


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
