"""Measure a code source without a teacher on 2,000 Python files of this environment's packages.

`sources.code.read` runs in its own process: finding files, cutting them, making prompts. Reading into a loop's store is
measured too. If `read` takes more than 30 seconds, the benchmark fails.
"""

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import end, publish
from finetune_pipeline.settings import CodeSource, load_loop

FILES = 2_000
LIMIT_SECONDS = 30


def main() -> None:
    """Copy the files, read them, and publish the results."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        repository = Path(folder) / "repository"
        size = _copy(repository)
        env = {**os.environ, "FINETUNE_HOME": f"{folder}/home"}
        command = [sys.executable, "-m", "benchmarks.code", str(repository)]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    results = {"files": FILES, "megabytes": size / 1e6, "limit_seconds": LIMIT_SECONDS, **json.loads(output)}
    rows = [
        ["reading (find, cut, make prompts)", f"{results['read_seconds']:.1f} s", f"{LIMIT_SECONDS} s"],
        ["CPU time of it", f"{results['read_cpu_seconds']:.1f} s", ""],
        ["reading into an empty store", f"{results['store_seconds']:.1f} s", ""],
        ["reading again, nothing new", f"{results['again_seconds']:.1f} s", ""],
        ["peak memory", f"{results['peak_mb']:.0f} MB", ""],
    ]
    publish("code", [f"{FILES:,} files, {results['records']:,} records", "measured", "at most"], rows, results)
    seconds = results["read_seconds"]
    end([f"reading took {seconds:.1f} s, at most {LIMIT_SECONDS} s"] if seconds > LIMIT_SECONDS else [])


def measure(repository: str) -> dict[str, Any]:
    """Read a repository, then read it into a loop's store twice."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.source_sync import reader_for, sync_source
    from finetune_pipeline.sources.code import read
    from finetune_pipeline.sources.source_record import SourceRecord

    source = CodeSource(kind="code", name="repository", path=repository)
    started = time.perf_counter()
    found = list(read(source, None))
    seconds, cpu_seconds = [time.perf_counter() - started], time.process_time()
    loop, database = load_loop("aec_parser"), connect()
    for _ in range(2):
        started = time.perf_counter()
        sync_source(loop, source, database, reader_for(source, loop.curation.redaction))
        seconds.append(time.perf_counter() - started)
    records = sum(isinstance(one, SourceRecord) for one in found)
    return {
        **dict(zip(("read_seconds", "store_seconds", "again_seconds"), seconds, strict=True)),
        "read_cpu_seconds": cpu_seconds, "records": records, "skipped": len(found) - records,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }  # fmt: skip


def _copy(repository: Path) -> int:
    """Copy 2,000 files of 1 to 200 kB from the standard library and installed packages; return their size in bytes."""
    size = taken = 0
    for root in (Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])):
        for path in sorted(root.rglob("*.py")):
            data = path.read_bytes()
            if taken == FILES or not 1_000 <= len(data) <= 200_000:
                continue
            target = repository / f"part{taken // 100:02}" / f"{taken:04}_{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            size, taken = size + len(data), taken + 1
    return size


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
