"""The example loop of a test file, in a home of its own."""

import pytest

from finetune_pipeline_tests.orchestration.whole_loop.example_loop import Loop


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return Loop(tmp_path_factory.mktemp("loop"))


@pytest.fixture(autouse=True)
def in_its_home(loop, own_home, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(loop.home))
