"""What every test stands on: a home of its own, so that nothing of a checkout's state is ever touched."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pytest

from finetune_pipeline.records import Feedback, Interaction
from finetune_pipeline.settings import PROJECT_ROOT

SHARED = PROJECT_ROOT.parent / "shared" / "data"
NAMESPACE = UUID("00000000-0000-4000-8000-000000000000")
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test writes under its own FINETUNE_HOME."""
    home = tmp_path / "home"
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv("FINETUNE_DATABASE_URL", raising=False)
    yield home


def uid(name: str) -> UUID:
    """An id by name, the same in every run."""
    return uuid5(NAMESPACE, name)


def interaction(name: str, **fields: Any) -> Interaction:
    """An interaction with what a test does not care about filled in."""
    given = {"prompt": f"prompt {name}", "output": f"answer {name}", "confidence": 0.9, "created_at": START}
    return Interaction(id=uid(name), task="notes", **{**given, **fields})


def feedback(name: str, on: str, kind: str, minutes: int = 0, **fields: Any) -> Feedback:
    """A feedback on the interaction `on`, some minutes after the start."""
    at = START + timedelta(minutes=minutes)
    return Feedback(id=uid(name), task="notes", interaction_id=uid(on), created_at=at, kind=kind, **fields)
