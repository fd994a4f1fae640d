"""Time of an adapter swap, idle and under the load of 8 clients, compared with a new engine."""

import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.results import publish
from finetune_pipeline.export.gguf import convert, convert_adapter
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.adapters import write_adapter

STARTER = PROJECT_ROOT / "data" / "starter_model"
CLIENTS = 8
SWAPS = 20
RANK = 16
REQUEST = GenerateRequest(messages=[{"role": "user", "content": "200 mm concrete wall, 2 hour rating"}], max_tokens=48)


def main() -> None:
    """Swap 20 times under each condition."""
    with tempfile.TemporaryDirectory(prefix="finetune-swap-") as name:
        base, one, other = _make(Path(name))
        adapters = [other, one] * (SWAPS // 2)
        began = time.perf_counter()
        with Engine(ModelSpec(gguf=base, adapter=one, parallel=CLIENTS)) as engine:
            engine.submit(REQUEST).result()
            seconds = {"new engine and one answer": [time.perf_counter() - began]}
            seconds["one answer without a swap"] = [_answer(engine) for _ in adapters]
            seconds["swap, idle"] = [_swap(engine, adapter) for adapter in adapters]
            seconds["swap, idle, and one answer"] = [_swap(engine, adapter) + _answer(engine) for adapter in adapters]
            answered, seconds[f"swap, {CLIENTS} clients"] = _swap_under_load(engine, adapters)
    rows = [
        [what, len(taken), f"{statistics.median(taken) * 1000:.1f} ms", f"{max(taken) * 1000:.1f} ms"]
        for what, taken in seconds.items()
    ]
    publish("adapter_swap", ["", "count", "median", "maximum"], rows, {"seconds": seconds, "answered": answered})


def _swap(engine: Engine, adapter: Path) -> float:
    began = time.perf_counter()
    engine.swap_adapter(adapter).result()
    return time.perf_counter() - began


def _answer(engine: Engine) -> float:
    began = time.perf_counter()
    engine.submit(REQUEST).result()
    return time.perf_counter() - began


def _swap_under_load(engine: Engine, adapters: list[Path]) -> tuple[int, list[float]]:
    """Return the number of answers, and the time of each swap, which waits for the running answers."""
    stop = threading.Event()

    def client() -> int:
        answered = 0
        while not stop.is_set():
            engine.submit(REQUEST).result()
            answered += 1
        return answered

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        taken = []
        for adapter in adapters:
            time.sleep(0.1)
            taken.append(_swap(engine, adapter))
        stop.set()
    return sum(each.result() for each in clients), taken


def _make(folder: Path) -> list[Path]:
    """Return the GGUF files of the base model and of two random adapters."""
    base = folder / "base.gguf"
    convert(STARTER, base)
    files = [base]
    for seed in range(2):
        write_adapter(STARTER, folder / str(seed), seed, rank=RANK)
        files.append(folder / f"{seed}.gguf")
        convert_adapter(folder / str(seed), STARTER, files[-1])
    return files


if __name__ == "__main__":
    main()
