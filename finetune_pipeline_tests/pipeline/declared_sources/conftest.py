"""The loop with a declared source, on each database."""

import pytest

from .declared_source import SOURCE


@pytest.fixture(autouse=True)
def on_each_database(url, monkeypatch):
    """Every test here runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


@pytest.fixture
def loop(make_loop):
    return make_loop(sources=[SOURCE], curation={"min_examples": 1, "validation_fraction": 0.0})
