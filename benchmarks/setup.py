"""Time to set up a new clone, first with an empty package cache, then with the cache that the first run filled."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.results import publish

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Clone and set up twice, with one package cache."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-setup-"))
    env = {**os.environ, "PIP_CACHE_DIR": str(folder / "cache")}
    clone, seconds = folder / "clone", {}
    try:
        for cache in ("cold", "warm"):
            shutil.rmtree(clone, ignore_errors=True)
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            started = time.perf_counter()
            subprocess.run(["make", "setup"], cwd=clone, env=env, check=True)
            seconds[cache] = time.perf_counter() - started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [[cache, f"{value:.0f} s"] for cache, value in seconds.items()]
    publish("setup", ["package cache", "make setup"], rows, {"seconds": seconds})


if __name__ == "__main__":
    main()
