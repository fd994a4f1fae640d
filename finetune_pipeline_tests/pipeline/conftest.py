"""The small loop of the orchestration tests, with its fixtures, and models that were promoted in it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_pipeline.registry.model_versions import ModelVersion
from finetune_pipeline_tests.orchestration.conftest import (  # noqa: F401
    corrected,
    definitions,
    instance,
    loop,
    make_loop,
    write_events,
)
from finetune_pipeline_tests.registry.conftest import promote_gguf


@pytest.fixture
def promoted(own_home: Path) -> Callable[..., ModelVersion]:
    """Return a function that promotes a model with this content."""

    def promote(content: str, size: int = 0) -> ModelVersion:
        path = own_home / "artifacts" / "notes" / "gguf_model" / content / "model.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "." * size)
        return promote_gguf(path)

    return promote
