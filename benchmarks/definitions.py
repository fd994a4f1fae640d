"""Time to resolve all Dagster definitions in a new process, and the heavy packages that this imports."""

import json
import statistics
import subprocess
import sys
import time

from benchmarks.results import publish

RUNS = 7
LIMIT_SECONDS = 2.0
HEAVY = ("torch", "transformers", "datasets", "llama_cpp", "trl", "peft")
RESOLVE = f"""
import json, sys
from finetune_pipeline.definitions import defs
graph = defs().resolve_asset_graph()
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"assets": len(graph.get_all_asset_keys()), "heavy": loaded}}))
"""


def main() -> None:
    """Measure the process from the start of the interpreter to its end."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        output = subprocess.run([sys.executable, "-c", RESOLVE], check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - started)
    found = json.loads(output)
    median = statistics.median(seconds)
    metrics = {"seconds": seconds, "median_seconds": median, "limit_seconds": LIMIT_SECONDS, **found}
    row = [found["assets"], f"{median:.2f} s", f"{min(seconds):.2f} to {max(seconds):.2f} s", found["heavy"] or "none"]
    publish("definitions", ["assets", f"median of {RUNS}", "range", "heavy packages loaded"], [row], metrics)


if __name__ == "__main__":
    main()
