"""What pages read again and again: when it is kept, read again, and dropped."""

import pytest

from finetune_pipeline.console import read_cache
from finetune_pipeline.database import connect
from finetune_pipeline_tests.serving.conftest import make_loop
from finetune_pipeline_tests.waiting import wait_until


@pytest.fixture
def reads():
    """Return a function that counts its calls, and read it through an empty cache."""
    read_cache.clear()
    calls = []

    def count(loop, database, name):
        calls.append(name)
        if name == "broken" and len(calls) > 1:
            raise OSError("the disk is gone")
        return len(calls)

    return lambda name="x": read_cache.read(count, make_loop(), connect(), name)


def test_a_fresh_value_is_kept_for_its_arguments(reads):
    assert (reads(), reads(), reads("y"), reads()) == (1, 1, 2, 1)


def test_an_action_drops_all_values(reads):
    assert reads() == 1
    read_cache.clear()
    assert reads() == 2


def test_an_older_value_is_shown_while_a_newer_one_is_read(reads, monkeypatch):
    assert reads() == 1
    monkeypatch.setattr(read_cache, "FRESH_SECONDS", -1)
    assert reads() == 1
    wait_until(lambda: reads() > 1)


def test_a_value_that_is_too_old_is_not_shown(reads, monkeypatch):
    assert reads() == 1
    monkeypatch.setattr(read_cache, "KEPT_SECONDS", 0)
    assert reads() == 2


def test_an_error_in_the_background_is_raised_at_the_next_visit(reads, monkeypatch):
    assert reads("broken") == 1
    monkeypatch.setattr(read_cache, "FRESH_SECONDS", -1)

    def fails():
        try:
            return not reads("broken")
        except OSError:
            return True

    wait_until(fails)
