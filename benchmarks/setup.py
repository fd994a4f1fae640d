"""A fresh clone, set up twice: with an empty package cache, then with the one that this filled."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.results import publish

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Clone, set up, remove the clone, clone again, set up again."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-setup-"))
    env = {**os.environ, "PIP_CACHE_DIR": str(folder / "cache")}
    try:
        seconds = {name: _set_up(folder / "clone", env) for name in ("cold", "warm")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [[name, f"{value:.0f} s"] for name, value in seconds.items()]
    publish("setup", ["package cache", "make setup"], rows, {"seconds": seconds})


def _set_up(clone: Path, env: dict[str, str]) -> float:
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    started = time.perf_counter()
    subprocess.run(["make", "setup"], cwd=clone, env=env, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
