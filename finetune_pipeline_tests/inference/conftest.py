"""Real models: one with random weights, and a trained one where it is available."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.probe import write_tiny_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline_tests.conftest import SHARED

LLAMA_CPP = Path(sys.prefix) / "share" / "llama.cpp"
WITH_BOS = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


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
def stories_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return stories260k as a Hugging Face folder, with a chat template that writes the BOS token."""
    if not (SHARED / "stories260k").exists():
        pytest.skip(
            f"{SHARED / 'stories260k'} does not exist: the trained model of these tests is not part of the project"
        )
    folder = tmp_path_factory.mktemp("stories") / "stories260k"
    shutil.copytree(SHARED / "stories260k", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": WITH_BOS}))
    return folder


@pytest.fixture(scope="session")
def stories_gguf(stories_folder: Path) -> Path:
    """Return the same model as an F16 GGUF."""
    gguf = stories_folder.parent / "stories.gguf"
    run_converter("convert_hf_to_gguf.py", stories_folder, "--outfile", gguf, "--outtype", "f16")
    return gguf


@pytest.fixture(scope="session")
def stories(stories_gguf: Path) -> Iterator[Engine]:
    """Return an engine with the stories model."""
    with Engine(ModelSpec(gguf=stories_gguf, context=256, parallel=4)) as engine:
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
