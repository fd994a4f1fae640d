"""Overhead of the gateway compared with an earlier commit of it, and with litellm's proxy.

commit     `finetune serve` of this tree and of the commit BASELINE (checked out beside it, run by the same Python) take
           turns for ROUNDS rounds: 8 clients, recording on, the same model and prompts. Compared is the time of a
           request outside the engine (header Server-Timing), the minimum of the rounds.
proxies    clients ask a third gateway directly, through litellm's proxy, and through this gateway with that server as
           `serving.upstream`. Compared is the latency that clients see.

litellm's proxy is installed into an environment of its own, below data/state, on first use.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from benchmarks.gateway import CLIENTS, LOOP, REQUESTS, free_port, load, serving_model, wait_for
from benchmarks.results import end, publish
from finetune_pipeline.settings import PROJECT_ROOT

BASELINE = "d387a9d"
"""The last commit before the API was widened by the Responses API, tools and several choices for each request."""
ROUNDS = 5
PROXY = "proxy"
P50_RATIO, P99_RATIO = 0.65, 0.5
"""The wanted fraction of the earlier commit's overhead: a third less, and half for the slowest requests."""
LITELLM = "litellm[proxy]==1.108.7"


@dataclass(frozen=True)
class Server:
    """A command that serves, and the folder and home in which it runs."""

    tree: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process of this server."""
        kept = {name: value for name, value in os.environ.items() if name != "FINETUNE_DATABASE_URL"}
        own = {"FINETUNE_HOME": self.home, "FINETUNE_LOOPS_DIR": self.home / "loops", "PYTHONPATH": self.tree}
        return {**kept, **{name: str(path) for name, path in own.items()}}

    def promote(self) -> None:
        """Promote the starter model, by the tree's own benchmark, because registries of old commits differ."""
        code = "from benchmarks import gateway; gateway._versions()"
        subprocess.run([sys.executable, "-c", code], cwd=self.tree, env=self.environment, check=True)

    @contextmanager
    def running(self, loop: str = LOOP) -> Iterator[str]:
        """Serve a loop, and yield the URL once its model is loaded."""
        port = free_port()
        command = [sys.executable, "-m", "finetune_pipeline.cli.main", "serve", "--loop", loop]
        command += ["--port", str(port)]
        with (self.home / "gateway.log").open("a") as log:
            process = subprocess.Popen(command, cwd=self.tree, env=self.environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: process.poll() is not None or serving_model(url, loop) is not None, 120)
            if process.poll() is not None:
                sys.exit(f"the gateway of {self.tree} ended:\n{(self.home / 'gateway.log').read_text()}")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    """Run both comparisons."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder, _checkout(Path(folder) / "tree") as tree:
        servers = {"now": Server(PROJECT_ROOT, Path(folder) / "now"), BASELINE: Server(tree, Path(folder) / "before")}
        for server in servers.values():
            (server.home / "loops").mkdir(parents=True)
            server.promote()
        overhead: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for number in range(ROUNDS):
            order = list(servers) if number % 2 else list(servers)[::-1]
            for name in order:
                with servers[name].running() as url:
                    load(url, 80, CLIENTS)  # warm-up
                    measured = load(url, REQUESTS, CLIENTS).overhead_ms
                percentiles = statistics.quantiles(measured, n=100)
                overhead[name].append((percentiles[49], percentiles[98]))
                print(f"round {number + 1}/{ROUNDS} {name}: p50 {percentiles[49]:.2f} ms, p99 {percentiles[98]:.2f} ms")
        latency = _proxies(servers["now"], Path(folder))
    best = {name: (min(p50 for p50, _ in rounds), min(p99 for _, p99 in rounds)) for name, rounds in overhead.items()}
    ratio = [best["now"][index] / best[BASELINE][index] for index in (0, 1)]
    rows: list[list[object]] = [
        [f"overhead per request, {CLIENTS} clients, p50", *_pair(best, 0), f"{ratio[0]:.2f}", f"at most {P50_RATIO}"],
        [f"overhead per request, {CLIENTS} clients, p99", *_pair(best, 1), f"{ratio[1]:.2f}", f"at most {P99_RATIO}"],
    ]
    direct = latency["direct"]
    for name in ("this gateway", "litellm's proxy"):
        added = latency[name][0] - direct[0], latency[name][1] - direct[1]
        rows.append(
            [f"added latency of {name}, p50 and p99", f"{added[0]:.2f} and {added[1]:.2f} ms", "", "", "reported"]
        )
    metrics = {"overhead_ms": overhead, "best_ms": best, "ratio": ratio, "latency_ms": latency, "requests": REQUESTS}
    publish("gateway_peers", ["", "now", BASELINE, "ratio", "target"], rows, metrics)
    missed = [
        f"{name} {found:.2f} instead of {target}"
        for name, found, target in zip(("p50", "p99"), ratio, (P50_RATIO, P99_RATIO), strict=True)
        if found > target
    ]
    end(missed)


def _pair(best: dict[str, tuple[float, float]], index: int) -> list[str]:
    return [f"{best[name][index]:.2f} ms" for name in ("now", BASELINE)]


@contextmanager
def _checkout(tree: Path) -> Iterator[Path]:
    """Check out the earlier commit; it runs with this tree's packages, starter model and data."""
    if shutil.which("git") is None:
        sys.exit("this benchmark needs git and a complete clone")
    git = ["git", "-C", str(PROJECT_ROOT), "worktree"]
    if subprocess.run([*git, "add", "--quiet", "--detach", str(tree), BASELINE], check=False).returncode:
        sys.exit(f"commit {BASELINE} is not in this clone; fetch the complete history: git fetch --unshallow")
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _proxies(server: Server, folder: Path) -> dict[str, tuple[float, float]]:
    """Return p50 and p99 in ms of the latency that clients of a gateway see, directly and through both proxies."""
    latency: dict[str, list[tuple[float, float]]] = {"direct": [], "this gateway": [], "litellm's proxy": []}
    ours = Server(PROJECT_ROOT, folder / "proxy")
    with server.running() as direct:
        loop = ours.home / "loops" / PROXY / "defs.yaml"
        loop.parent.mkdir(parents=True)
        upstream = {"url": f"{direct}/v1", "model": LOOP}
        settings = {
            "name": PROXY, "key_prefix": PROXY, "base_model": str(PROJECT_ROOT / "data" / "starter_model"),
            "evaluation": {"benchmark": str(PROJECT_ROOT / f"data/benchmarks/{LOOP}.jsonl"), "metric": "rouge1"},
            "serving": {"upstream": upstream, "fallback": None},
        }  # fmt: skip
        component = {"type": "finetune_pipeline.orchestration.FineTuneLoop", "attributes": settings}
        loop.write_text(yaml.safe_dump(component))
        with ours.running(PROXY) as proxy, _litellm(direct, folder) as litellm:
            servers = {
                "direct": (direct, LOOP), "this gateway": (proxy, PROXY), "litellm's proxy": (litellm, LOOP)
            }  # fmt: skip
            for url, model in servers.values():
                load(url, 80, CLIENTS, model)  # warm-up
            for _ in range(ROUNDS):
                for name, (url, model) in servers.items():
                    percentiles = statistics.quantiles(load(url, REQUESTS, CLIENTS, model).latency_ms, n=100)
                    latency[name].append((percentiles[49], percentiles[98]))
                    print(f"{name}: latency p50 {percentiles[49]:.1f} ms, p99 {percentiles[98]:.1f} ms")
    return {name: (min(a for a, _ in rounds), min(b for _, b in rounds)) for name, rounds in latency.items()}


@contextmanager
def _litellm(upstream: str, folder: Path) -> Iterator[str]:
    """Run litellm's proxy in front of a server, and yield its URL once it answers."""
    python = PROJECT_ROOT / "data" / "state" / "litellm" / "bin" / "python"
    if not python.exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--quiet", python.parent.parent], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, LITELLM], check=True)
    model = {"model": f"openai/{LOOP}", "api_base": f"{upstream}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    # Without keys, like the gateway on loopback.
    general = {"dangerously_permit_weak_or_unset_master_key": True}
    settings = {"model_list": [{"model_name": LOOP, "litellm_params": model}], "general_settings": general}
    config.write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "litellm.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**variables, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or _answers(url), 120)
        if process.poll() is not None:
            sys.exit(f"litellm's proxy ended:\n{(folder / 'litellm.log').read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/liveliness").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
