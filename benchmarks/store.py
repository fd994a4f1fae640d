"""Benchmark of the event store: latency, throughput, memory, import time, a million interactions, 1 GB of event files.

Baselines in the same run: a line of JSON appended with fsync, and a SQLAlchemy insert and commit into a table with the
same columns (SQLite's defaults, which flush every commit). Compared are those that survive the same fault: a kill of
the process (the store's default; the file without fsync), or a power cut (FINETUNE_DURABILITY=power-cut; baselines).
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from benchmarks.results import end, publish
from finetune_pipeline.records import Feedback, Interaction

LOOP = "aec_parser"
SINGLE = 2_000
BATCHED = 100_000
SIZES = (10_000, 100_000, 1_000_000)
P99_MS, EVENTS_PER_SECOND, GROWTH_MB, ANSWER_MS = 5.0, 2_000, 20, 50
OUTPUT = '{"element":"wall","material":"concrete","thickness_mm":150,"fire_rating_hr":2,"location":"California"}'


def main() -> None:
    """Run each measurement in its own process, so that none warms another's caches or counts its memory."""
    metrics: dict[str, Any] = {}
    for name in ("store_kill", "store_power_cut", "json_fsync", "json_kill", "sqlalchemy"):
        metrics[name] = _in_a_process("one_and_many", name)
    metrics["import"] = _in_a_process("import")
    rows = [_row(name, metrics[name], metrics) for name in metrics if name != "import"]
    publish(
        "store", ["recorder", "one event, p50", "p99", "in batches", "growth over 100,000", "p99 ratio"], rows, metrics
    )
    loaded = metrics["import"]
    print(f"\nimport of the client: {loaded['seconds']:.2f} s, heavy packages loaded: {loaded['heavy'] or 'none'}")
    _million()
    _logs()


def _logs() -> None:
    one = _in_a_process("logs")
    row = [f"{one['files']} files, {one['gigabytes']:.1f} GB", f"{one['tick_ms']:.1f} ms", f"{one['verify_s']:.2f} s"]
    publish("store_logs", ["event files", "the sensor's check of them", "verifying all bytes read"], [row], one)
    end([f"a check takes {one['tick_ms']:.0f} ms"] if one["tick_ms"] > ANSWER_MS else [])


def _million() -> None:
    metrics = _in_a_process("million")
    rows = [
        [
            f"{one['interactions']:,}", f"{one['query_ms']:.1f} ms", f"{one['query_idle_ms']:.1f} ms",
            f"{one['stats_ms']:.1f} ms", f"{one['newest_50_ms']:.1f} ms", f"{one['database_mb']:.0f} MB",
        ]
        for one in metrics["sizes"]
    ]  # fmt: skip
    headings = ["interactions", "sensor's query, 60 new", "nothing new", "counters", "recording 50 of each", "database"]
    publish("store_million", headings, rows, metrics)


def _row(name: str, one: dict[str, float], metrics: dict[str, Any]) -> list[str]:
    titles = {
        "store_kill": "this store, survives a kill",
        "store_power_cut": "this store, survives a power cut",
        "json_fsync": "JSON line + fsync (power cut)",
        "json_kill": "JSON line (kill)",
        "sqlalchemy": "plain SQLAlchemy insert + commit (power cut)",
    }
    ratio = one["p99_ms"] / metrics["sqlalchemy"]["p99_ms"]
    return [
        titles[name], f"{one['p50_ms']:.2f} ms", f"{one['p99_ms']:.2f} ms", f"{one['per_second']:,.0f}/s",
        f"{one['growth_mb']:.1f} MB", f"{ratio:.2f}",
    ]  # fmt: skip


def _in_a_process(*arguments: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as home:
        env = {**os.environ, "FINETUNE_HOME": home}
        if "store_power_cut" in arguments:
            env["FINETUNE_DURABILITY"] = "power-cut"
        command = [sys.executable, "-m", "benchmarks.store", *arguments]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def interaction(number: int, **fields: Any) -> Interaction:
    """Return an interaction like those of the default loop."""
    values = {
        "prompt": f"150 mm concrete wall number {number}, two hour rating, California, for level {number % 40}",
        "output": OUTPUT, "confidence": 0.93, "user": f"u{number % 50:02}", "model": "aec_parser@v1.0.0",
    }  # fmt: skip
    return Interaction(id=uuid7(), loop=LOOP, created_at=datetime.now(UTC), **{**values, **fields})


def one_and_many(kind: str) -> dict[str, float]:
    """Measure the latency of single events, the throughput of batches, and the growth of memory."""
    one, many = {
        "store_kill": _store, "store_power_cut": _store, "json_fsync": lambda: _file(flush=True),
        "json_kill": lambda: _file(flush=False), "sqlalchemy": _sqlalchemy,
    }[kind]()  # fmt: skip
    seconds = []
    for number in range(SINGLE):
        event = interaction(number)
        started = time.perf_counter()
        one(event)
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    before, started = _resident_mb(), time.perf_counter()
    many(interaction(number) for number in range(BATCHED))
    elapsed = time.perf_counter() - started
    return {
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * seconds[int(0.99 * SINGLE)],
        "per_second": BATCHED / elapsed,
        "growth_mb": max(0.0, _resident_mb() - before),
    }


Recorders = tuple[Callable[[Interaction], Any], Callable[[Iterator[Interaction]], Any]]


def _store() -> Recorders:
    from finetune_pipeline.feedback import FeedbackClient

    client = FeedbackClient(LOOP)
    return lambda event: client.log_many([event]), client.log_many


def _file(*, flush: bool) -> Recorders:
    file = os.open(Path(os.environ["FINETUNE_HOME"]) / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(data: bytes) -> None:
        os.write(file, data)
        if flush:
            os.fsync(file)

    def many(events: Iterator[Interaction]) -> None:
        for batch in _batches(events):
            write(b"".join(event.model_dump_json().encode() + b"\n" for event in batch))

    return lambda event: write(event.model_dump_json().encode() + b"\n"), many


def _sqlalchemy() -> Recorders:
    engine = sa.create_engine(f"sqlite:///{os.environ['FINETUNE_HOME']}/baseline.db")
    columns = [sa.Column(name, sa.String) for name in Interaction.model_fields if name not in {"id", "history"}]
    table = sa.Table("interactions", sa.MetaData(), sa.Column("id", sa.String, primary_key=True), *columns)
    table.metadata.create_all(engine)

    def insert(events: list[Interaction]) -> None:
        with engine.begin() as connection:
            rows = [event.model_dump(mode="json", exclude={"history"}) for event in events]
            connection.execute(table.insert(), rows)

    def many(events: Iterator[Interaction]) -> None:
        for batch in _batches(events):
            insert(batch)

    return lambda event: insert([event]), many


def _batches(events: Iterator[Interaction], size: int = 1_000) -> Iterator[list[Interaction]]:
    batch: list[Interaction] = []
    for event in events:
        batch.append(event)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _resident_mb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def importing() -> dict[str, Any]:
    """Measure the import of the client in a fresh process."""
    code = (
        "import sys, json, time; t = time.perf_counter(); from finetune_pipeline.feedback import FeedbackClient; "
        "names = ('torch', 'dagster', 'alembic', 'fastapi', 'transformers', 'pyarrow', 'pandas'); "
        "print(json.dumps({'seconds': time.perf_counter() - t, 'heavy': [n for n in names if n in sys.modules]}))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def million() -> dict[str, Any]:
    """Measure the sensor's query, the counters and recording, with growing history; a third has feedback."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.feedback.content_hash import content_hash
    from finetune_pipeline.feedback.store import mark_judged, newest_offset
    from finetune_pipeline.pipeline.pending import count_new
    from finetune_pipeline.settings import load_loop

    loop, client, database = load_loop(LOOP), FeedbackClient(LOOP), connect()
    sizes, held = [], 0
    for size in SIZES:
        client.log_many(history(held, size))
        held = size
        with database.read() as connection:
            watermark = newest_offset(connection)
        idle = _milliseconds(partial(count_new, loop, database, watermark))
        batches = [[_new(size + i) for i in range(n, n + 50)] for n in range(60, 360, 50)]
        newest = [_new(size + i) for i in range(60)]
        taken = []
        for batch in [*batches, newest[:50]]:  # the last one is what the sensor has to find
            with database.read() as connection:
                watermark = newest_offset(connection)
            taken.append(_milliseconds(partial(client.log_many, [e for pair in batch for e in pair]), times=1))
        taking = statistics.median(taken)
        client.log_many(event for pair in newest[50:] for event in pair)
        query = _milliseconds(partial(_expect, 60, partial(count_new, loop, database, watermark)))
        stats = _milliseconds(client.stats)
        with database.write() as connection:
            mark_judged(connection, LOOP, [content_hash(i.prompt, i.output) for i, _ in newest])
        sizes.append(
            {
                "interactions": size, "query_ms": query, "query_idle_ms": idle, "stats_ms": stats,
                "newest_50_ms": taking, "database_mb": Path(database.engine.url.database or "").stat().st_size / 1e6,
            }
        )  # fmt: skip
        print(sizes[-1], file=sys.stderr)
    return {"sizes": sizes, "limit_ms": ANSWER_MS}


def logs(files: int = 200, megabytes: int = 5) -> dict[str, Any]:
    """Measure the sensor's check of the event files at each tick, and an ingest after all files were touched."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.settings import load_loop
    from finetune_pipeline.sources import ingest_ledger
    from finetune_pipeline.sources.ingest_reader import IngestLine, open_log

    loop, database, content = load_loop(LOOP), connect(), os.urandom(megabytes * 10**6)
    folder = loop.drop_folder
    folder.mkdir(parents=True)
    ends = {}
    for number in range(files):
        path = folder / f"log-{number:04}.jsonl"
        path.write_bytes(number.to_bytes(4) + content)
        ends[path] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        with database.write() as connection:
            line = IngestLine(1, ends[path][0], None, prefix_hash=ends[path][1])
            ingest_ledger.advance(
                connection, LOOP, ingest_ledger.look_at(path), ingest_ledger.Position(), [line], finished=True
            )

    def check() -> None:
        with database.read() as connection:
            if found := ingest_ledger.unread(connection, LOOP, [folder]):
                sys.exit(f"{len(found)} files count as unread")

    def verify() -> None:
        for path, (size, prefix_hash) in ends.items():
            with open_log(path) as log:
                if not log.skip_if_unchanged(size, prefix_hash):
                    sys.exit(f"{path} counts as rewritten")

    tick, verifying = _milliseconds(check, times=50), _milliseconds(verify, times=3)
    return {"files": files, "gigabytes": files * megabytes / 1e3, "tick_ms": tick, "verify_s": verifying / 1e3}


def history(start: int, end: int) -> Iterator[Interaction | Feedback]:
    """Yield interactions with these numbers, a third of them with a thumb."""
    for number in range(start, end):
        one = interaction(number)
        yield one
        if number % 3 == 0:
            yield _thumb(one, "thumbs_up" if number % 2 else "thumbs_down")


def _new(number: int) -> tuple[Interaction, Feedback]:
    one = interaction(number, prompt=f"{number} timber beam, span {number % 97} dm, Oregon, exposed, painted white")
    return one, _thumb(one, "thumbs_up")


def _thumb(one: Interaction, kind: Any) -> Feedback:
    return Feedback(id=uuid7(), loop=LOOP, interaction_id=one.id, created_at=one.created_at, kind=kind)


def _expect(wanted: int, count: Callable[[], int]) -> None:
    found = count()
    if found != wanted:
        sys.exit(f"the sensor counted {found} instead of {wanted}")


def _milliseconds(work: Callable[[], Any], times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        work: dict[str, Callable[..., Any]] = {
            "one_and_many": one_and_many,
            "import": importing,
            "million": million,
            "logs": logs,
        }
        print(json.dumps(work[sys.argv[1]](*sys.argv[2:])))
