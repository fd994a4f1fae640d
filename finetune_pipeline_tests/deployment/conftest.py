"""Releases of the starter model, which differ by quantization, and an Ollama server."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment import modelfiles
from finetune_pipeline.deployment import ollama as ollama_module
from finetune_pipeline.deployment.ollama import Ollama
from finetune_pipeline.deployment.target import Release
from finetune_pipeline.export.gguf import convert, quantize
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.settings import PROJECT_ROOT, OllamaTarget
from finetune_pipeline_tests.deployment.ollama_contract import OllamaContract, ollama_contract

STARTER = PROJECT_ROOT / "data" / "starter_model"
REAL_OLLAMA = "FINETUNE_TEST_OLLAMA_URL"
_names = count(1)


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the starter model in two quantizations, which a target treats as two models."""
    folder = tmp_path_factory.mktemp("ggufs")
    files = {kind: folder / f"{kind}.gguf" for kind in ("F16", "Q8_0")}
    convert(STARTER, files["F16"])
    quantize(files["F16"], files["Q8_0"], "Q8_0")
    return files


@pytest.fixture
def make_release(ggufs: dict[str, Path]) -> Callable[..., Release]:
    """Return a function that makes a release of one of the GGUFs."""

    def make(label: str = "v1.0.0", kind: str = "F16", **changes: Any) -> Release:
        sha256 = hash_file(ggufs[kind])
        release = Release(
            loop="notes", label=label, sha256=sha256, gguf=ggufs[kind], gguf_sha256=sha256, base_folder=STARTER,
            base_name="starter_model", system_prompt="Parse the request.", context=512, max_tokens=64,
        )  # fmt: skip
        return dataclasses.replace(release, **changes)

    return make


_tokenizers: dict[Path, Any] = {}


@pytest.fixture(autouse=True)
def tokenizers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tokenizers of base models."""

    def read(folder: Path) -> Any:
        if folder not in _tokenizers:
            _tokenizers[folder] = load_tokenizer(folder)
        return _tokenizers[folder]

    monkeypatch.setattr(ollama_module, "load_tokenizer", read)
    monkeypatch.setattr(modelfiles, "load_tokenizer", read)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OllamaContract]:
    """Run a server with Ollama's documented behavior."""
    with ollama_contract(tmp_path / "ollama") as running:
        yield running


@pytest.fixture
def make_ollama() -> Callable[..., Ollama]:
    """Return a function that makes a target of a server's URL."""

    def make(url: str, model: str = "notes", **settings: Any) -> Ollama:
        return Ollama(OllamaTarget(url=url, model=model, **settings), "notes")

    return make


@pytest.fixture(params=["contract", pytest.param("real", marks=pytest.mark.servers)])
def ollama(request: pytest.FixtureRequest, make_ollama: Callable[..., Ollama]) -> Iterator[Ollama]:
    """Return a target of the contract server, and of a real Ollama if FINETUNE_TEST_OLLAMA_URL is its URL."""
    if request.param == "contract":
        server = request.getfixturevalue("server")
        yield make_ollama(server.url)
        assert server.violations == []
        return
    url = os.environ.get(REAL_OLLAMA)
    if not url:
        pytest.skip(f"set {REAL_OLLAMA} to the URL of an Ollama server, such as http://127.0.0.1:11434")
    model = f"finetune-test-{os.getpid()}-{next(_names)}"
    yield make_ollama(url, model, timeout_seconds=300)
    for one in httpx.get(f"{url}/api/tags").json()["models"]:
        if one["name"].startswith(f"{model}:"):
            httpx.request("DELETE", f"{url}/api/delete", json={"model": one["name"]})
