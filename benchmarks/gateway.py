"""Overhead, throughput and hot swap of the gateway.

`finetune serve` runs in its own process with the starter model at Q4_K_M; HTTP clients run in this one. The same
requests are also sent to an engine without the gateway.

overhead   time of a request in the gateway without the engine's (header Server-Timing), with 8 clients
tokens     generated tokens per second: one client, eight clients, and the engine alone with 1 and 8 requests
swaps      20 switches between two versions under the load of 8 clients: failed requests, time until the new one serves
"""

import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.results import publish

LOOP = "aec_parser"
CLIENTS, REQUESTS, SWAPS, ROLLBACKS = 8, 800, 20, 5
OVERHEAD_MS, GAIN, ROLLBACK_SECONDS = 3.0, 1.3, 5.0
_TIMING = re.compile(r"gateway;dur=([0-9.]+)")


def main() -> None:
    """Run all measurements against one gateway."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as home:
        os.environ["FINETUNE_HOME"] = home
        os.environ.pop("FINETUNE_DATABASE_URL", None)
        versions = _versions()
        engine = {parallel: _engine_tokens_per_second(parallel) for parallel in (1, CLIENTS)}
        with _gateway() as url:
            load(url, 40, CLIENTS)  # warm-up
            one = load(url, REQUESTS // 4, 1)
            eight = load(url, REQUESTS, CLIENTS)
            swaps = _swaps(url, versions)
            rollbacks = [_rollback(url) for _ in range(ROLLBACKS)]
    _publish(one, eight, engine, swaps, rollbacks)


def _publish(
    one: "Load", eight: "Load", engine: dict[int, float], swaps: dict[str, Any], rollbacks: Sequence[float]
) -> None:
    overhead = statistics.quantiles(eight.overhead_ms, n=100)
    gain, alone = eight.tokens_per_second / one.tokens_per_second, engine[CLIENTS] / engine[1]
    rows = [
        ["overhead per request, 8 clients, p50", f"{overhead[49]:.2f} ms", f"at most {OVERHEAD_MS} ms"],
        ["overhead per request, 8 clients, p99", f"{overhead[98]:.2f} ms", ""],
        ["tokens per second, one client", f"{one.tokens_per_second:,.0f}", f"engine alone {engine[1]:,.0f}"],
        ["tokens per second, 8 clients", f"{eight.tokens_per_second:,.0f}", f"engine alone {engine[CLIENTS]:,.0f}"],
        ["throughput of 8 clients to one", f"{gain:.2f}x", f"at least {GAIN}x; engine alone {alone:.2f}x"],
        [f"{SWAPS} swaps under 8 clients", f"{swaps['failed']} of {swaps['requests']:,} failed", "none"],
        ["time from switch to service", f"at most {max(swaps['seconds']):.2f} s", ""],
        ["time from rollback to service", f"at most {max(rollbacks):.2f} s", f"under {ROLLBACK_SECONDS:.0f} s"],
    ]
    metrics = {
        "overhead_p50_ms": overhead[49],
        "overhead_p99_ms": overhead[98],
        "one_tokens_per_second": one.tokens_per_second,
        "eight_tokens_per_second": eight.tokens_per_second,
        "engine_tokens_per_second": engine,
        "gain": gain,
        "swaps": swaps,
        "rollback_seconds": list(rollbacks),
        "requests": REQUESTS,
        "failed": eight.failed + one.failed,
    }
    publish("gateway", ["", "measured", "goal or reference"], rows, metrics)


def _versions() -> list[str]:
    """Promote two versions of the default loop: copies of its base model with different hashes."""
    from finetune_pipeline.artifacts import hash_file
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.registry.champion import champion, promote
    from finetune_pipeline.registry.model_versions import CandidateModel
    from finetune_pipeline.settings import home, load_loop

    path = base_gguf(load_loop(LOOP), lambda _: None)
    database, names = connect(), []
    for number in range(2):
        own = home() / f"version-{number}.gguf"
        own.write_bytes(path.read_bytes() + bytes(number))  # llama.cpp ignores bytes after the end
        candidate = CandidateModel(
            loop=LOOP, gguf_path=own, gguf_sha256=hash_file(own), base_hash="benchmark", mode="full", lineage={},
            scores={}, report_path=own,
        )  # fmt: skip
        before = champion(database, LOOP)
        model = promote(database, candidate, before.id if before else None, "benchmark", "benchmark", None, "force")
        names.append(model.version)
    return names


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _gateway() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "serve", "--port", str(port)]
    log = Path(os.environ["FINETUNE_HOME"]) / "gateway.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: serving_model(url) is not None, 120)
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Load:
    """Results of the clients."""

    def __init__(self) -> None:
        self.overhead_ms: list[float] = []
        self.latency_ms: list[float] = []
        self.tokens = 0
        self.requests = 0
        self.failed = 0
        self.tokens_per_second = 0.0
        self._lock = threading.Lock()

    def send(self, client: http.client.HTTPConnection, prompt: str, model: str = LOOP) -> None:
        """Send one request, with a client that takes little CPU time from the gateway."""
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]})
        started = time.perf_counter()
        try:
            client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = client.getresponse()
            answer = json.loads(response.read())
            tokens = answer["usage"]["completion_tokens"]
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            print(f"failed: {error!r}", file=sys.stderr)
            client.close()
            with self._lock:
                self.requests += 1
                self.failed += 1
            return
        seconds = time.perf_counter() - started
        timing = _TIMING.search(response.headers.get("server-timing", ""))
        with self._lock:
            self.requests += 1
            self.tokens += tokens
            self.latency_ms.append(1000 * seconds)
            self.overhead_ms.append(float(timing[1]) if timing else float("nan"))


def _client(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)


def load(url: str, requests: int, clients: int, model: str = LOOP) -> Load:
    """Send different prompts from several clients at once, and return what they got."""
    load, prompts = Load(), _prompts(requests)

    def work(own: Sequence[str]) -> None:
        client = _client(url)
        for prompt in own:
            load.send(client, prompt, model)
        client.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, [prompts[i::clients] for i in range(clients)]))
    load.tokens_per_second = load.tokens / (time.perf_counter() - started)
    return load


def _engine_tokens_per_second(parallel: int) -> float:
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.inference.engine import Engine
    from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
    from finetune_pipeline.pipeline.loop_files import constraint
    from finetune_pipeline.records import chat_messages
    from finetune_pipeline.settings import load_loop

    loop = load_loop(LOOP)
    gguf = base_gguf(loop, lambda _: None)
    requests = [
        GenerateRequest(
            messages=chat_messages(loop.system_prompt, prompt),
            max_tokens=loop.max_tokens,
            json_schema=constraint(loop),  # as the gateway does
        )
        for prompt in _prompts(REQUESTS // (1 if parallel > 1 else 4))
    ]
    with Engine(ModelSpec(gguf=gguf, context=loop.context, parallel=parallel)) as engine:
        engine.generate(requests[:16])
        started = time.perf_counter()
        tokens = sum(answer.completion_tokens for answer in engine.generate(requests))
        return tokens / (time.perf_counter() - started)


def _swaps(url: str, versions: Sequence[str]) -> dict[str, Any]:
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import switch

    load, stop, seconds = Load(), threading.Event(), []

    def work(number: int) -> None:
        client = _client(url)
        while not stop.is_set():
            load.send(client, _prompts(number + 8)[-1])
        client.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(CLIENTS):
            pool.submit(work, number)
        for number in range(SWAPS):
            version = versions[number % len(versions)]
            started = time.perf_counter()
            switch(connect(), LOOP, version, "benchmark", "benchmark")
            wait_for(partial(_serves, url, version), 60)
            seconds.append(time.perf_counter() - started)
        stop.set()
    return {"swaps": SWAPS, "requests": load.requests, "failed": load.failed, "seconds": seconds}


def _rollback(url: str) -> float:
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import rollback

    started = time.perf_counter()
    model = rollback(connect(), LOOP, "benchmark", "benchmark")
    wait_for(lambda: serving_model(url) == (model.name if model else f"{LOOP}@base"), 60)
    return time.perf_counter() - started


def _prompts(count: int) -> list[str]:
    materials = ("concrete", "brick", "timber", "steel", "gypsum")
    return [f"{100 + 10 * (i % 40)} mm {materials[i % 5]} wall, {1 + i % 4} hour fire rating" for i in range(count)]


def _serves(url: str, version: str) -> bool:
    return serving_model(url) == f"{LOOP}@{version}"


def serving_model(url: str, loop: str = LOOP) -> str | None:
    """Return the model that a gateway serves; None if it does not answer yet."""
    try:
        found: str | None = httpx.get(f"{url}/healthz").json()["loops"][loop]["serving"]
    except httpx.HTTPError:
        return None
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition is met, and exit if it is not met in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"the condition was not met within {seconds} s")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
