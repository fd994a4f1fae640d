"""Benchmark curation from a Parquet snapshot to the written dataset, and near-duplicate removal next to its peers.

The rows are requests of the default loop with its JSON answers: 15% exact duplicates, 10% near-duplicates with the
same answer (Jaccard similarity from 0.8), 3% that differ by one number and therefore in their answer, feedback of
every kind, and some e-mail addresses, phone numbers and keys. Memory is sampled over the process and its workers.

Near-duplicate removal is measured on one core, on the same rows as its peers: `datasketch` (MinHash LSH with the same
permutations, shingles and threshold) and `semhash`, in an environment of their own that is created first. The model of
semhash would have to be downloaded, so it gets hashed character n-grams (3 to 5) as vectors. Recall is the fraction of
the planted near-duplicates that were removed, precision the fraction of the removed rows that were planted.

It takes about 10 minutes, and ends with an error if a target was missed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

from benchmarks.curation_peers import measure
from benchmarks.results import end, publish
from finetune_pipeline.settings import PROJECT_ROOT, home

LOOP = "aec_parser"
SIZES = (500, 10_000, 1_000_000)
COMPARED = 100_000
OURS = "this project"
PEERS = ("datasketch==2.0.0", "semhash==0.5.0")
EXACT, NEAR, NUMBER = 0.15, 0.10, 0.03
TIMES = {500: 2.0, 10_000: 3.0, 1_000_000: 120.0}
ONLY_TIMED = 10_000  # rows, up to which time and memory are measured in a run each
MEMORY_MB, NEAR_SECONDS = 2**31 / 1e6, 30.0  # of a million rows
RATIO, RECALL, PRECISION = 10, 0.95, 0.98

Line = dict[str, Any]


def main() -> None:
    """Measure every size, then the peers."""
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        sizes = [_measure(Path(name) / str(size), size) for size in SIZES]
        rows = [
            [
                f"{one['rows']:,}", f"{one['seconds']:.1f} s", f"{TIMES[one['rows']]:g} s",
                f"{one['peak_pss_mb']:,.0f} MB", f"{one['again_seconds']:.1f} s", f"{one['kept']:,}",
            ]
            for one in sizes
        ]  # fmt: skip
        headings = ["rows", "curated, with start", "at most", "peak memory", "5% more rows", "examples"]
        publish("curation", headings, rows, {"sizes": sizes})
        metrics["compared"] = _compare(Path(name))
    rows = [
        [one["name"], f"{one['rows']:,}", f"{one['seconds']:.1f} s", f"{one['recall']:.1%}", f"{one['precision']:.1%}"]
        for one in metrics["compared"]
    ]
    publish("curation_near", ["near-duplicate removal", "rows", "time", "recall", "precision"], rows, metrics)
    end([*missed_sizes(sizes), *missed_beside_peers(metrics["compared"])])


def missed_sizes(sizes: list[dict[str, Any]]) -> list[str]:
    """Return the missed targets of whole curations."""
    missed = [
        f"{one['rows']:,} rows in {one['seconds']:.1f} s, at most {TIMES[one['rows']]:g} s"
        for one in sizes
        if one["seconds"] > TIMES[one["rows"]]
    ]
    largest = max(one["peak_pss_mb"] for one in sizes)
    return [*missed, *([f"{largest:,.0f} MB, at most {MEMORY_MB:,.0f} MB"] if largest > MEMORY_MB else [])]


def missed_beside_peers(compared: list[dict[str, Any]]) -> list[str]:
    """Return the missed targets of near-duplicate removal; the last result of this project has the most rows."""
    few, many = (one for one in compared if one["name"] == OURS)
    peer = next(one for one in compared if one["name"] == "datasketch")
    ratio = peer["seconds"] / few["seconds"]
    metrics = [
        (many["seconds"] <= NEAR_SECONDS, f"compared in {many['seconds']:.1f} s, at most {NEAR_SECONDS:g} s"),
        (ratio >= RATIO, f"{ratio:.1f} times as fast as datasketch, at least {RATIO} times"),
        (few["recall"] >= peer["recall"], f"recall {few['recall']:.3f}, that of datasketch is {peer['recall']:.3f}"),
        *((one["recall"] >= RECALL, f"recall {one['recall']:.3f}, at least {RECALL}") for one in (few, many)),
        *((one["precision"] >= PRECISION, f"precision {one['precision']:.3f}, at least {PRECISION}")
          for one in (few, many)),
    ]  # fmt: skip
    return [text for reached, text in metrics if not reached]


def _measure(folder: Path, size: int) -> dict[str, Any]:
    """Curate this many rows in a new process with its own home, then again with 5% new rows."""
    folder.mkdir()
    write_snapshot(folder / "first.parquet", size, seed=1)
    write_snapshot(folder / "second.parquet", size // 20, seed=2)
    environment = {**os.environ, "FINETUNE_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "benchmarks.curation", "run", str(folder / "first.parquet")]
    seconds = None
    if size <= ONLY_TIMED:  # sampling the memory ten times a second would take a seventh of so short a run
        began = time.perf_counter()
        subprocess.run(
            command, env=environment | {"FINETUNE_HOME": str(folder / "timed")}, check=True, cwd=PROJECT_ROOT
        )
        seconds = time.perf_counter() - began
    first = _watched(command, environment)
    first["seconds"] = seconds or first["seconds"]
    both = [folder / "first.parquet", folder / "second.parquet"]
    again = _watched([sys.executable, "-m", "benchmarks.curation", "run", *both], environment)
    return {"rows": size, **first, "again_seconds": again["seconds"]}


def _watched(command: list[Any], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return the JSON that it prints last, its time, and its peak memory with its children."""
    import psutil

    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=PROJECT_ROOT)
    watched, rss, pss = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        sampled = [_memory(one) for one in [watched, *_children(watched)]]
        rss, pss = max(rss, sum(one[0] for one in sampled)), max(pss, sum(one[1] for one in sampled))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"{command} failed")
    said: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**said, "seconds": seconds, "peak_rss_mb": rss / 1e6, "peak_pss_mb": pss / 1e6}


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _memory(process: Any) -> tuple[int, int]:
    import psutil

    try:
        full = process.memory_full_info()
        return full.rss, getattr(full, "pss", full.rss)
    except psutil.Error:
        return 0, 0


def run(*paths: str) -> dict[str, Any]:
    """Curate these files as a snapshot of the default loop, as the asset curated_dataset does."""
    import shutil

    from finetune_pipeline import artifacts
    from finetune_pipeline.manifests import RawLogsManifest
    from finetune_pipeline.pipeline.build_dataset import build_dataset
    from finetune_pipeline.settings import load_loop

    loop = load_loop(LOOP)
    numbers = dict.fromkeys(["interactions", "feedback", "examples", "new", "watermark"], 0)
    with artifacts.draft(loop.name, RawLogsManifest.stage, str(len(paths))) as folder:
        for path in paths:
            shutil.copy(path, folder)
        names = [Path(path).name for path in paths]
        given = {"loop": loop.name, "version": str(len(paths)), "inputs": {}, "settings": {}, "packages": {}}
        logs = artifacts.publish(folder, RawLogsManifest, {**given, **numbers, "shards": names})
    manifest = build_dataset(loop, logs).manifest
    return {"kept": manifest.train + manifest.validation, "left_out": manifest.left_out, "redacted": manifest.redacted}


# --- The rows ---------------------------------------------------------------------------------------------------------


def write_snapshot(path: Path, size: int, seed: int) -> None:
    """Write a Parquet file as `raw_logs` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune_pipeline.pipeline.snapshot import COLUMNS

    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    kinds = {"turns": turns, "timestamp": pa.timestamp("us", tz="UTC")}
    schema = pa.schema({name: kinds.get(kind) or pa.type_for_alias(kind) for name, kind in COLUMNS.items()})
    batch: list[Line] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for line in lines(size, seed):
            batch.append(line)
            if len(batch) == 2_000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))


def lines(size: int, seed: int) -> Iterator[Line]:
    """Yield rows of a snapshot."""
    rng = Random(seed + 1_000)
    for number, line in enumerate(requests(size, seed)):
        yield {**line, **_judged(line, rng), "interaction_id": str(UUID(int=rng.getrandbits(128), version=4)),
               "ingest_offset": number + 1, "model": "aec_parser@v1.0.0", "user": f"u{number % 50:02}"}  # fmt: skip


def requests(size: int, seed: int) -> Iterator[Line]:
    """Yield requests with their correct answers; `domain` is the request that a row is, or is a copy of."""
    rng = Random(seed)
    recent: list[Line] = []
    for number in range(size):
        draw = rng.random()
        copy = None
        if recent and draw < EXACT + NEAR + NUMBER:
            like = rng.choice(recent)
            copy = _exact(like, rng) if draw < EXACT else _near(like, rng) if draw < EXACT + NEAR else None
            copy = copy or _other_number(like, rng, f"{seed}-{number}")
        line = copy or _request(rng, f"{seed}-{number}")
        if line["kind"] == "request":
            if len(recent) < 20_000:
                recent.append(line)
            else:
                recent[rng.randrange(len(recent))] = line
        yield line


def _wording() -> Any:
    folder = str(PROJECT_ROOT / "scripts" / "aec")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module("wording")


_PROJECTS = (
    "Harbor",
    "Mill",
    "Cedar",
    "Union",
    "Ridge",
    "Lake",
    "Grove",
    "Stone",
    "Amber",
    "Falcon",
    "Laurel",
    "Quarry",
)
_KINDS = (
    "School",
    "Clinic",
    "Tower",
    "Library",
    "Depot",
    "Lofts",
    "Hotel",
    "Arena",
    "Market",
    "Campus",
    "Museum",
    "Court",
)
_STREETS = ("Main", "Oak", "Pine", "Maple", "Second", "Bridge", "Water", "Church", "High", "Elm", "Park", "Station")


def _request(rng: Random, name: str) -> Line:
    wording = _wording()
    prompt, spec = wording.request(rng.choice(wording.SLICES), rng.choice(("plain", "firm")), rng)
    place = (
        f"{rng.choice(_PROJECTS)}{rng.choice(_PROJECTS).lower()} {rng.choice(_KINDS)}, {rng.randrange(1, 999)} "
        f"{rng.choice(_STREETS)} St, level {rng.randrange(1, 40)}, room {rng.randrange(100, 9999)}"
    )
    return {
        "prompt": f"{prompt} ({place})",
        "target": wording.answer_text(spec),
        "domain": name,
        "kind": "request",
    }


def _exact(like: Line, rng: Random) -> Line:
    prompt = rng.choice((str, str, str.upper, lambda text: f"  {text} "))(like["prompt"])
    return {**like, "prompt": prompt, "kind": "exact"}


def _near(like: Line, rng: Random) -> Line | None:
    """Return the same request with small differences, if it is similar enough to be a near-duplicate."""
    from finetune_pipeline.curation.decontamination import jaccard, shingles

    prompt = rng.choice(_EDITS)(like["prompt"], rng)
    similar = jaccard(shingles(prompt), shingles(like["prompt"]))
    return {**like, "prompt": prompt, "kind": "near"} if 0.8 <= similar < 1 else None


def _slip(text: str, rng: Random) -> str:
    index = rng.choice([index for index, letter in enumerate(text) if letter.isalpha()])
    return text[:index] + rng.choice(("", text[index] * 2)) + text[index + 1 :]


_EDITS = (
    _slip,
    lambda text, rng: _slip(_slip(text, rng), rng),
    lambda text, rng: f"{text} {rng.choice(('please', 'thanks', 'asap', 'thx!'))}",
    lambda text, rng: f"{rng.choice(('Hi, ', 'Hello: ', 'again: '))}{text}",
    lambda text, rng: text.replace(",", ";", 1).replace(" St", " Street", 1),
)  # fmt: skip


def _other_number(like: Line, rng: Random, name: str) -> Line:
    """Return a request that differs from another one by a number, in its answer too."""
    answer = json.loads(like["target"])
    keys = [key for key in answer if key.endswith("_mm") and re.search(rf"\b{answer[key]}\b", like["prompt"])]
    if not keys:
        return _request(rng, name)
    key = rng.choice(keys)
    other = answer[key] + rng.choice((10, 20, 30))
    prompt = re.sub(rf"\b{answer[key]}\b", str(other), like["prompt"])
    target = json.dumps({**answer, key: other}, ensure_ascii=False, separators=(",", ":"))
    return {"prompt": prompt, "target": target, "domain": name, "kind": "request"}


def _judged(line: Line, rng: Random) -> Line:
    """Return the feedback on a row, and sometimes an answer or a secret that must not be trained on."""
    draw, prompt = rng.random(), line["prompt"]
    found: Line = {"output": line["target"], "confidence": rng.uniform(0.5, 1), "confirmed": False, "corrected": False}
    if draw < 0.55:
        found |= {"reward": rng.uniform(0.8, 1), "confirmed": rng.random() < 0.4}
        found["confidence"] = rng.uniform(0.8, 1)
    elif draw < 0.70:
        found |= {"reward": rng.uniform(0.2, 0.6), "corrected": True, "output": line["target"].replace(":", ":1", 1)}
    elif draw < 0.80:
        found |= {"reward": -rng.uniform(0.3, 1)}
    elif draw < 0.85:
        found |= {"reward": 0.5, "output": "I think it is a wall.", "target": "I think it is a wall."}
    else:
        found |= {"target": None, "reward": None, "confirmed": None, "corrected": None}
    if line["kind"] == "request" and (planted := rng.random()) < 0.03:
        secrets = (f"mail a{rng.randrange(10**6)}@example.com", f"ring +49 30 {rng.randrange(10**5, 10**6)}",
                   "key sk-proj-" + "".join(rng.choices("abcdefgh0123456789", k=32)))  # fmt: skip
        found["prompt"] = f"{prompt} {secrets[int(planted * 100)]}"
    return found


# --- The peers --------------------------------------------------------------------------------------------------------


def _compare(folder: Path) -> list[dict[str, Any]]:
    """Measure each method on the same rows: requests and near-duplicates without exact duplicates."""
    few, many = folder / "few.json", folder / "many.json"
    for path, size in ((few, COMPARED), (many, SIZES[-1])):
        rows = (line for line in requests(size, 3) if line["kind"] != "exact")
        path.write_text(json.dumps([[row["prompt"], row["target"], row["domain"]] for row in rows]))
    peers = [_peers(), PROJECT_ROOT / "benchmarks" / "curation_peers.py"]
    work: list[tuple[str, list[Any]]] = [
        (OURS, [sys.executable, "-m", "benchmarks.curation", "ours", few]),
        (OURS, [sys.executable, "-m", "benchmarks.curation", "ours", many]),
        ("datasketch", [*peers, "datasketch", few]),
        ("semhash", [*peers, "semhash", few]),
    ]
    return [{"name": name, **_one_core(command)} for name, command in work]


def _one_core(command: list[Any]) -> dict[str, Any]:
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _peers() -> Path:
    folder = home() / "benchmarks" / "curation-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True)
    return python


def ours(rows: list[list[str]]) -> list[int]:
    """Return the indices that this project keeps."""
    import numpy as np

    from finetune_pipeline.curation.deduplication import Sketches, near_duplicates, sketch
    from finetune_pipeline.curation.filter import answer_hash
    from finetune_pipeline.records import normalize

    prompts = [normalize(row[0]) for row in rows]
    targets = np.array([answer_hash(row[1]) for row in rows], np.uint64)
    batches = [sketch(prompts[at : at + 2_000], targets[at : at + 2_000]) for at in range(0, len(rows), 2_000)]
    sketches = Sketches(
        *(np.concatenate([getattr(b, name) for b in batches]) for name in ("bands", "bits", "shingles", "targets"))
    )
    labels = near_duplicates(sketches, 0.8, lambda indices: [prompts[index] for index in indices.tolist()])
    return [int(index) for index in np.unique(labels, return_index=True)[1]]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "run":
        print(json.dumps(run(*sys.argv[2:])))
    else:
        measure(ours, sys.argv[2])
