"""Real gateways with real models: the starter model as base, and quantizations of it as promoted versions.

The tests of a module share one home and database; a test that changes models uses a loop of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.export import base_gguf as base_gguf_module
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.export.gguf import convert, convert_adapter, quantize
from finetune_pipeline.export.model import ExportedModel
from finetune_pipeline.registry import champion
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion
from finetune_pipeline.serving.app import server_config
from finetune_pipeline.serving.connections import ConnectionLimits
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import RequestGuard
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, home
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.waiting import wait_until

STARTER = PROJECT_ROOT / "data" / "starter_model"
PROMPT = "Add a 150 mm brick wall, 3 m high"
KINDS = ("F16", "Q8_0", "Q6_K", "Q4_K_M")

LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 150}
"""A schema whose answers always reach max_tokens."""

MakeLoop = Callable[..., LoopSettings]


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the starter model in several quantizations, which a gateway treats as different models."""
    folder = tmp_path_factory.mktemp("ggufs")
    files = {kind: folder / f"{kind}.gguf" for kind in KINDS}
    convert(STARTER, files["F16"])
    for kind in KINDS[1:]:
        quantize(files["F16"], files[kind], kind)
    return files


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two adapters that change the starter model's answers."""
    folder = tmp_path_factory.mktemp("adapters")
    files = [folder / "one.gguf", folder / "two.gguf"]
    for seed, file in enumerate(files):
        write_adapter(STARTER, folder / file.stem, seed)
        convert_adapter(folder / file.stem, STARTER, file)
    return files


@pytest.fixture(scope="session", autouse=True)
def converted_once(ggufs: dict[str, Path]) -> Iterator[None]:
    """Replace the conversion of base models, which takes eight seconds, by copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_gguf_module, "export", copying(ggufs))
        yield


def copying(ggufs: Mapping[str, Path]) -> Callable[..., ExportedModel]:
    """Return an export of the starter model that copies these files, by quantization."""

    def export(
        base: Path, adapter: None, folder: Path, quantization: str, tell: Callable[[str], None]
    ) -> ExportedModel:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in {"F16", quantization}:
            shutil.copyfile(ggufs[kind], folder / f"model-{kind}.gguf")
        return ExportedModel(folder / f"model-{quantization}.gguf", folder / "model-F16.gguf")

    return export


@pytest.fixture(scope="module", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give each module its own FINETUNE_HOME."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(folder))
        for name in ("DAGSTER_HOME", "FINETUNE_DATABASE_URL", "FINETUNE_DURABILITY"):
            patch.delenv(name, raising=False)
        yield folder


def make_loop(name: str = "notes", **changes: Any) -> LoopSettings:
    """Return settings of a loop with the starter model."""
    attributes: dict[str, Any] = {
        "name": name,
        "base_model": "data/starter_model",
        "system_prompt": "Parse the request.",
        "export": {"quantization": "F16"},
        "evaluation": {"benchmark": "none.jsonl", "metric": "rouge1", "max_tokens": 64, "context": 512},
        **changes,
    }
    return LoopSettings.model_validate(attributes)


def promote(gguf: Path, loop: str = "notes", adapter: Path | None = None, **fields: Any) -> ModelVersion:
    """Promote a copy of these files to the loop's champion."""
    database = connect()
    now = champion.champion(database, loop)
    folder = home() / "artifacts" / loop / f"gguf-{time.time_ns()}"
    folder.mkdir(parents=True)
    files = [folder / "model.gguf", folder / "adapter.gguf"]
    shutil.copyfile(gguf, files[0])
    if adapter:
        # Adapters share the base model's file, as after an export.
        files[0].unlink()
        files[0] = gguf
        shutil.copyfile(adapter, files[1])
    candidate = CandidateModel(
        loop=loop,
        gguf_path=files[0],
        gguf_sha256=hash_file(files[0]),
        adapter_path=files[1] if adapter else None,
        adapter_sha256=hash_file(files[1]) if adapter else None,
        mode="full",
        scores={"accuracy": 0.5},
        report_path=folder / "report.html",
        **{"base_hash": "base", "lineage": {}, **fields},
    )
    expected = now.id if now else None
    return champion.promote(database, candidate, expected, "tests", "a test needs it", None, action="force")


class Running:
    """A running gateway and a client for it; `gateway` and `server` are None if it runs in another process."""

    def __init__(self, url: str, gateway: Gateway | None = None, server: uvicorn.Server | None = None) -> None:
        self.url = url
        self.gateway = gateway
        self.server = server
        self.http = httpx.Client(base_url=url, timeout=300)

    @property
    def guard(self) -> RequestGuard:
        """The outermost middleware."""
        assert self.server is not None and isinstance(self.server.config.app, RequestGuard)
        return self.server.config.app

    def openai(self, **fields: Any) -> openai.OpenAI:
        """Return the official client, without retries."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **fields})

    def ask(self, content: str = PROMPT, model: str = "notes", **fields: Any) -> httpx.Response:
        """Send one message."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def ask_all(self, messages: list[dict[str, Any]], model: str = "notes", **fields: Any) -> dict[str, Any]:
        """Send a conversation and return the response."""
        response = self.http.post("/v1/chat/completions", json={"model": model, "messages": messages, **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def interaction(self, id: str) -> dict[str, Any]:
        """Return the recorded interaction with this id."""
        response = self.http.get(f"/v1/interactions/{id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's values with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.http.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def health(self) -> dict[str, Any]:
        """Return the response of /healthz."""
        return dict(self.http.get("/healthz").json())


@contextmanager
def serving(
    *loops: LoopSettings, limits: ConnectionLimits | None = None, allow_origins: Collection[str] = ()
) -> Iterator[Running]:
    """Run a gateway with these loops in this process."""
    gateway = Gateway(loops, connect(), allow_origins=allow_origins, progress=lambda _: None)
    server = uvicorn.Server(server_config(gateway, limits, port=0, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the gateway did not start; its log says why"
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Running(f"http://127.0.0.1:{port}", gateway, server)
        yield running
        running.http.close()
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the gateway does not stop"


@contextmanager
def process(*arguments: str, port: int, **environment: str) -> Iterator[tuple[Running, subprocess.Popen[str]]]:
    """Run `finetune serve` in a process."""
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "serve", "--port", str(port), *arguments]
    started = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = Running(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: started.poll() is not None or _answers(running))
        assert started.poll() is None, started.stdout.read() if started.stdout else ""
        yield running, started
    finally:
        running.http.close()
        started.kill()
        started.wait()


def _answers(running: Running) -> bool:
    try:
        running.http.get("/healthz")
        return True
    except httpx.TransportError:
        return False


def free_port() -> int:
    """Return an unused port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the server-sent events of a complete stream, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def notes(own_home: Path) -> Iterator[Running]:
    """Run a gateway with one loop that serves its base model."""
    base_gguf(make_loop(), print)
    with serving(make_loop()) as running:
        yield running
