"""Measure how long it takes to read an Obsidian vault of 10,000 notes. Nothing is cached between reads.

If the fastest read takes more than 20 seconds, the benchmark fails.
"""

import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import end, publish
from finetune_pipeline.settings import VaultSource
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.sources.vault import read

NOTES = 10_000
RUNS = 3
LIMIT_SECONDS = 20
WORDS = [
    "wall", "beam", "roof", "saw", "timber", "mill", "crane", "clay", "water", "permit", "price", "week", "team",
    "plan", "office", "storage", "record", "event", "model", "answer", "choice", "reason", "because", "after",
    "before", "we", "they", "it", "was", "is", "keeps", "holds", "needs", "shows", "the", "a", "of", "in", "on", "with",
]  # fmt: skip


def main() -> None:
    """Write the vault, read it, and publish how long that took."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        megabytes = write_vault(Path(folder), NOTES) / 1e6
        found = vault(Path(folder))
    row = [
        f"{NOTES:,}", f"{megabytes:.1f} MB", f"{found['records']:,}", f"{found['best_seconds']:.2f} s",
        f"{found['cpu_seconds']:.2f} s", f"{found['peak_mb']:.0f} MB",
    ]  # fmt: skip
    headings = ["notes", "size", "conversations", f"best of {RUNS}", "CPU of one read", "peak memory"]
    publish("vault", headings, [row], {**found, "notes": NOTES, "megabytes": megabytes, "limit_seconds": LIMIT_SECONDS})
    end([f"{found['best_seconds']:.1f} s, at most {LIMIT_SECONDS} s"] if found["best_seconds"] > LIMIT_SECONDS else [])


def vault(folder: Path) -> dict[str, Any]:
    """Read a vault several times, as a loop does at each of its runs."""
    source, seconds, records = VaultSource(kind="vault", name="notes", path=str(folder)), [], 0
    busy = time.process_time()
    for _ in range(RUNS):
        started = time.perf_counter()
        records = sum(isinstance(one, SourceRecord) for one in read(source, None))
        seconds.append(time.perf_counter() - started)
    cpu = (time.process_time() - busy) / RUNS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": seconds, "best_seconds": min(seconds), "cpu_seconds": cpu, "records": records, "peak_mb": peak}


def write_vault(folder: Path, notes: int) -> int:
    """Write a realistic vault, the same each time: a fifth are daily notes, and a third contain a record.

    Returns:
        Its size in bytes.
    """
    chance, size = random.Random(0), 0
    for number in range(notes):
        daily = number % 5 == 0
        day = f"{2000 + number // 1800}-{number // 140 % 12 + 1:02}-{number // 5 % 28 + 1:02}"
        name = f"Journal/{day} {number}.md" if daily else f"Area {number % 40}/Topic {number % 7}/Note {number}.md"
        content = _note(chance, number, daily).encode()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        size += len(content)
    return size


def _note(chance: random.Random, number: int, daily: bool) -> str:
    tag = chance.choice(["decision", "reflection", "learning"]) if chance.random() < 0.2 else "project"
    parts = [f"---\ntags: [{tag}, area/{number % 40}]\ncreated: 2024-05-03T10:00:00\naliases: [Other {number}]\n---\n"]
    if chance.random() < 0.3:
        parts.clear()  # many notes have no frontmatter
    for section in range(chance.randint(1, 6)):
        kind = chance.choice([" #decision", "", "", "", "", " #todo"])
        heading = chance.choice(["Reflection", "Decisions", "Log", "Tasks"]) if daily else f"Part {section}{kind}"
        parts.append(f"## {heading}\n\n{_text(chance)}\n")
        if chance.random() < 0.2:
            parts.append("```python\n# not a heading\nvalue = {1: 2}\n```\n")
    if chance.random() < 0.03:
        parts.append("#private\n")
    return "\n".join(parts)


def _text(chance: random.Random) -> str:
    words = chance.choices(WORDS, k=chance.randint(20, 120))
    words[5] = "[[Note 12|that note]]"
    words[-3:] = ["#project/bridge", "==marked==", "![[plan.png]]"]
    text = " ".join(words)
    return chance.choice([text, f"> [!note] Title\n> {text}", f"- [ ] {text}\n- {text[:80]}", f"{text} ^id{len(text)}"])


if __name__ == "__main__":
    main()
