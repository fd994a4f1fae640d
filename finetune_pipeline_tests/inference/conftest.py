"""Real models: one with random weights, and a trained one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.probe import write_tiny_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline_tests.stories import STORIES_GGUF

LLAMA_CPP = Path(sys.prefix) / "share" / "llama.cpp"


def run_converter(script: str, *arguments: object) -> None:
    """Run one of llama.cpp's converters, or skip the test if it is not installed."""
    if not (LLAMA_CPP / script).exists():
        pytest.skip(f"{LLAMA_CPP / script} does not exist: `make setup` installs llama.cpp's converter")
    subprocess.run(
        [sys.executable, str(LLAMA_CPP / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(LLAMA_CPP / "gguf-py")},
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="session")
def stories() -> Iterator[Engine]:
    """Return an engine with the trained model."""
    with Engine(ModelSpec(gguf=STORIES_GGUF, context=256, parallel=4)) as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model with a ChatML template and one token for each byte."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_gguf: Path) -> Iterator[Engine]:
    """Return an engine with the random model."""
    with Engine(ModelSpec(gguf=tiny_gguf, context=256, parallel=4)) as engine:
        yield engine
