"""Real llama-servers for tests: the program built from the pinned source, and the one in the package xllamacpp."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.waiting import wait_until

LLAMA_SERVER = "LLAMA_SERVER"
"""Environment variable with the path of llama-server, or `skip`. Default: it is built on first use, in minutes."""

XLLAMACPP_PYTHON = "XLLAMACPP_PYTHON"
"""Environment variable with a Python that has xllamacpp, or `skip`. Default: an environment is made on first use."""

_XLLAMACPP = "xllamacpp==2026.10.11549"
_RUN_XLLAMACPP = """
import sys, time, xllamacpp
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
params = xllamacpp.CommonParams()
params.model.path, params.port = flags["--model"], int(flags["--port"])
params.n_ctx, params.n_parallel = int(flags["--ctx-size"]), int(flags["--parallel"])
params.n_predict, params.sampling.temp = int(flags["--n-predict"]), float(flags["--temperature"])
adapters = [one.rpartition(":") for one in filter(None, flags.get("--lora-scaled", "").split(","))]
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, float(scale)) for path, _, scale in adapters]
params.cache_prompt = flags["--cache"] == "yes"
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


def free_port() -> int:
    """Return a port that no server listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def built_llama_server() -> Path:
    """Return the llama-server built from the pinned source package; it is built if necessary."""
    given = os.environ.get(LLAMA_SERVER)
    if given == "skip":
        pytest.skip(f"{LLAMA_SERVER}=skip")
    if given:
        return Path(given)
    folder = PROJECT_ROOT / "data" / "state" / "llama-server"
    made = subprocess.run(
        [PROJECT_ROOT / "scripts" / "make_llama_server.sh", folder], stdout=subprocess.PIPE, text=True
    )
    assert made.returncode == 0, "scripts/make_llama_server.sh failed; see its output above"
    return Path(made.stdout.strip())


def xllamacpp_python() -> Path:
    """Return a Python with xllamacpp; its environment is made if necessary."""
    given = os.environ.get(XLLAMACPP_PYTHON)
    if given == "skip":
        pytest.skip(f"{XLLAMACPP_PYTHON}=skip")
    if given:
        return Path(given)
    folder = PROJECT_ROOT / "data" / "state" / "xllamacpp"
    python, made = folder / "bin" / "python", folder / _XLLAMACPP
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", _XLLAMACPP], check=True)
        made.touch()
    return python


class RunningServer:
    """A llama-server in a process of its own, which tests kill and restart."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path]) -> None:
        """Start a command, after ending the one before, and wait until it answers."""
        self.stop()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"LLAMA_CACHE": str(self.log.parent / "cache"), "HF_HUB_CACHE": str(self.log.parent / "cache")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        wait_until(self._answers, what=lambda: self.log.read_text(errors="replace")[-3000:])

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the server and the processes that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            self._process.wait()
            self._process = None

    def chat(self, model: str, prompt: str, **fields: Any) -> str:
        """Return the answer to a prompt at temperature 0."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, **fields}
        response = httpx.post(f"{self.url}/v1/chat/completions", json={"temperature": 0, **body}, timeout=600)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=60).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def llama_server_at(log: Path) -> Iterator[RunningServer]:
    """Yield a server that is not started yet."""
    server = RunningServer(free_port(), log)
    try:
        yield server
    finally:
        server.stop()


def with_program(command: str, kind: str) -> list[str | Path]:
    """Return a printed start command for the program of a kind, `built` or `xllamacpp`."""
    words: list[str | Path] = [*shlex.split(command)]
    assert words[0] == "llama-server"
    if kind == "built":
        return [built_llama_server(), *words[1:]]
    cache = "no" if "--no-cache-prompt" in words else "yes"
    flags = [word for word in words[1:] if word not in {"--no-cache-prompt", "--cache-prompt"}]
    return [xllamacpp_python(), "-c", _RUN_XLLAMACPP, *flags, "--cache", cache]
