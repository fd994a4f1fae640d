"""The engine against llama-server with the starter model, measured in turns.

llama-server's C++ HTTP server comes from the package xllamacpp. It needs its own environment, because it brings another
llama.cpp; XLLAMACPP_PYTHON names its Python (python -m venv DIR; DIR/bin/pip install xllamacpp==2026.10.11549).
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway import free_port
from benchmarks.results import publish
from finetune_pipeline.export.gguf import convert, convert_adapter, quantize
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.adapters import write_adapter

STARTER = PROJECT_ROOT / "data" / "starter_model"
ROUNDS, CLIENTS, TOKENS = 12, 8, 96
START_SECONDS = 60
PROMPT = "200 mm concrete wall, 2 hour rating"

_SERVER = """
import json, sys, time, xllamacpp
given = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = given["gguf"]
params.no_extra_bufts = True  # weights are not repacked, as in the engine
params.n_ctx, params.n_parallel = given["context"], given["parallel"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
params.hostnames, params.port = ["127.0.0.1"], given["port"]
loras = []
for path, scale in given["adapters"]:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = path, scale
    loras.append(lora)
params.lora_adapters = loras
server = xllamacpp.Server(params)
print("serving", flush=True)
sys.stdin.read()
"""
"""Runs llama-server in the other environment until its input ends."""


def main() -> None:
    """Time both in turns: one client, eight clients, and an adapter swap with the first token after it."""
    python = os.environ.get("XLLAMACPP_PYTHON")
    if not python:
        print("llama_server: skipped, set XLLAMACPP_PYTHON to a Python with xllamacpp (see benchmarks/llama_server.py)")
        return
    with tempfile.TemporaryDirectory(prefix="finetune-llama-server-") as folder:
        gguf, adapters = _make(Path(folder))
        with ExitStack() as stack:
            engine, port = stack.enter_context(_engine(gguf, adapters[0])), free_port()
            server = stack.enter_context(started(_command(python, gguf, adapters, engine.info.threads, port), port))
            sides: dict[str, _EngineSide | _LlamaServerSide] = {
                "engine": _EngineSide(engine, adapters),
                "llama-server": _LlamaServerSide(server),
            }
            measured = _measure(sides)
    rows = []
    for what, by_side in measured.items():
        ours, theirs = (statistics.median(by_side[side]) for side in ("engine", "llama-server"))
        unit = "ms" if "swap" in what else "tokens/s"
        rows.append([what, f"{ours:.1f} {unit}", f"{theirs:.1f} {unit}", f"{ours / theirs:.2f}"])
    publish("llama_server", ["what", "engine", "llama-server", "ratio"], rows, {"measured": measured})


def _measure(sides: "dict[str, _EngineSide | _LlamaServerSide]") -> dict[str, dict[str, list[float]]]:
    measures: dict[str, Callable[[Any], float]] = {
        "one client": lambda side: _tokens_per_second(side, 1),
        f"{CLIENTS} clients": lambda side: _tokens_per_second(side, CLIENTS),
        "adapter swap and one token": _swap,
    }
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in sides} for what in measures}
    for what, measure in measures.items():
        for number in range(ROUNDS + 1):
            for name in random.sample(list(sides), len(sides)):
                value = measure(sides[name])
                if number:  # the first round is the warm-up
                    found[what][name].append(value)
    return found


def _tokens_per_second(side: "_EngineSide | _LlamaServerSide", clients: int) -> float:
    with ThreadPoolExecutor(clients) as threads:
        began = time.perf_counter()
        # Prompts differ in their first token, so that no prompt cache helps.
        tokens = sum(threads.map(lambda number: side.generate(f"{number}: {PROMPT}", TOKENS), range(clients)))
        return tokens / (time.perf_counter() - began)


def _swap(side: "_EngineSide | _LlamaServerSide") -> float:
    began = time.perf_counter()
    side.swap()
    side.generate(PROMPT, 1)
    return 1000 * (time.perf_counter() - began)


class _EngineSide:
    """The engine without the gateway, so without HTTP, which llama-server has."""

    def __init__(self, engine: Engine, adapters: list[Path]) -> None:
        self._engine, self._adapters, self._swaps = engine, adapters, 0

    def generate(self, prompt: str, tokens: int) -> int:
        request = GenerateRequest(prompt=prompt, max_tokens=tokens)
        return self._engine.submit(request).result().completion_tokens

    def swap(self) -> None:
        self._swaps += 1
        self._engine.swap_adapter(self._adapters[self._swaps % 2]).result()


class _LlamaServerSide:
    """llama-server over HTTP; both adapters are loaded at its start, and a swap changes their scales."""

    def __init__(self, url: str) -> None:
        self._http, self._swaps = httpx.Client(base_url=url, timeout=60), 0

    def generate(self, prompt: str, tokens: int) -> int:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        return int(self._http.post("/completion", json=body).raise_for_status().json()["tokens_predicted"])

    def swap(self) -> None:
        self._swaps += 1
        scales = [{"id": id, "scale": float(id == self._swaps % 2)} for id in range(2)]
        self._http.post("/lora-adapters", json=scales).raise_for_status()


def _make(folder: Path) -> tuple[Path, list[Path]]:
    gguf = folder / "starter.gguf"
    convert(STARTER, folder / "f16.gguf")
    quantize(folder / "f16.gguf", gguf, "Q4_K_M")
    adapters = [folder / "one.gguf", folder / "two.gguf"]
    for seed, adapter in enumerate(adapters):
        write_adapter(STARTER, folder / adapter.stem, seed)
        convert_adapter(folder / adapter.stem, STARTER, adapter)
    return gguf, adapters


def _engine(gguf: Path, adapter: Path) -> Engine:
    return Engine(ModelSpec(gguf=gguf, adapter=adapter, context=512, parallel=CLIENTS))


def _command(python: str, gguf: Path, adapters: list[Path], threads: int, port: int) -> list[str]:
    given = {"gguf": str(gguf), "context": 512 * CLIENTS, "parallel": CLIENTS, "threads": threads, "port": port}
    given["adapters"] = [[str(path), float(number == 0)] for number, path in enumerate(adapters)]
    return [python, "-c", _SERVER, json.dumps(given)]


@contextmanager
def started(command: Sequence[str], port: int) -> Iterator[str]:
    """Run a llama-server, which ends with the block, and yield its URL once it has loaded its model.

    Args:
        command: starts it on this machine; its input stays open as long as it should run.
        port: at which it listens.
    """
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        last = time.monotonic() + START_SECONDS
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > last:
                sys.exit(f"llama-server did not start within {START_SECONDS} s (exit status {process.poll()})")
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
