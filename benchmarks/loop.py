"""Run the loop on the sample logs as CI does, once for each of three seeds, each with its own FINETUNE_HOME."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results import publish
from finetune_pipeline.cli.dagster_home import environment

SEEDS = (0, 1, 2)
SAMPLE_SECONDS = 0.1
COMMAND = [
    sys.executable, "-m", "dagster", "asset", "materialize",
    "--select", '+key:"promoted_model"', "-m", "finetune_pipeline.definitions",
]  # fmt: skip


def main() -> None:
    """Run the loop for every seed and print time, memory and accuracy."""
    runs = [measure(seed) for seed in SEEDS]
    rows = [_row(str(run["seed"]), run) for run in runs]
    numbers = [key for key, value in runs[0].items() if isinstance(value, int | float) and key != "seed"]
    median = {key: statistics.median(run[key] for run in runs) for key in numbers}
    publish("loop", HEADINGS, [*rows, _row("median", median)], {"runs": runs, "median": median})


def measure(seed: int) -> dict[str, Any]:
    """Run the loop with this training seed and return its measurements."""
    home = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    os.environ["FINETUNE_HOME"] = str(home)
    os.environ.pop("DAGSTER_HOME", None)
    try:
        config = json.dumps({"ops": {"lora_adapter": {"config": {"seed": seed}}}})
        seconds, peaks, code, log = _run([*COMMAND, "--config-json", config], environment())
        reports = list(home.glob("artifacts/aec_parser/eval_report/*/report.json"))
        if len(reports) != 1:
            sys.exit(f"the loop wrote no report (exit code {code}):\n{log[-3000:]}")
        report = json.loads(reports[0].read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    largest = max(peaks.values())
    return {"seed": seed, "exit_code": code, "wall_seconds": seconds, "peak_mib": largest, **_accuracy(report)}


def _run(command: list[str], env: dict[str, str]) -> tuple[float, dict[int, float], int, str]:
    """Run a command; return seconds, peak resident MiB of each process of its tree, exit code and output."""
    started = time.perf_counter()
    peaks: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        processes: list[psutil.Process] = []
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                processes = [root, *root.children(recursive=True)]
            for one in processes:
                with suppress(psutil.NoSuchProcess):
                    peaks[one.pid] = max(peaks.get(one.pid, 0.0), one.memory_info().rss / 2**20)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        log.seek(0)
        return seconds, peaks, process.returncode, log.read()


def _accuracy(report: dict[str, Any]) -> dict[str, Any]:
    wordings = {group["name"]: group for group in report["wordings"]}
    result: dict[str, Any] = {}
    for name, group in [*wordings.items(), ("all", None)]:
        sides = {}
        for side in ("champion", "challenger"):
            totals = group[side] if group else report[side]["totals"]
            sides[side] = totals["correct"] / totals["total"]
            result[f"{name}_{'base' if side == 'champion' else 'new'}"] = sides[side]
        result[f"{name}_points"] = 100 * (sides["challenger"] - sides["champion"])
    result["gain_percent"] = 100 * (result["all_new"] / result["all_base"] - 1)
    return result


HEADINGS = ["seed", "loop", "largest process", "firm's wording", "plain wording", "all", "gain"]


def _row(name: str, run: dict[str, Any]) -> list[str]:
    def cell(part: str) -> str:
        return f"{run[f'{part}_base']:.1%} → {run[f'{part}_new']:.1%} ({run[f'{part}_points']:+.1f})"

    memory = f"{run['peak_mib'] / 1024:.2f} GiB"
    gain = f"{run['gain_percent']:+.1f}%"
    return [name, f"{run['wall_seconds']:.0f} s", memory, cell("firm"), cell("plain"), cell("all"), gain]


if __name__ == "__main__":
    main()
