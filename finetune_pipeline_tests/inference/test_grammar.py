"""Compiling schemas: each once, never without end, never more at a time than there are threads."""

import threading

import pytest

from finetune_pipeline.inference import grammar
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import COMPILERS, Grammars

LARGE = {"enum": [f"value {n} {'x' * 8}" for n in range(2500)]}


class Bytes:
    """A model whose tokens are the bytes, and one that ends an answer."""

    n_vocab = 257

    def piece(self, token):
        return bytes([token]) if token < 256 else b""

    def ends(self, token):
        return token == 256

    def is_marker(self, token):
        return token == 256

    def tokenize(self, text):
        return list(text.encode())


def test_a_schema_is_compiled_once():
    told = threading.Event()
    grammars = Grammars(Bytes(), told.set)
    first = grammars.grammar({"type": "boolean"})
    first.result(10)
    assert told.wait(10)
    assert grammars.grammar({"type": "boolean"}) is first
    assert grammars.grammar({"type": "integer"}) is not first
    assert first.result().matcher().allowed().sum() == 2  # t, f


def test_a_schema_that_is_refused_stays_refused():
    grammars = Grammars(Bytes(), lambda: None)
    for _ in range(2):
        with pytest.raises(RequestRefused, match="json_schema at #: not"):
            grammars.grammar({"not": {}}).result(10)


def test_a_compilation_beyond_its_time_fails_its_request_and_does_not_accumulate(monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.0)
    told = threading.Semaphore(0)
    grammars = Grammars(Bytes(), told.release)
    slow = [grammars.grammar({"title": str(n), **LARGE}) for n in range(COMPILERS)]
    for future in slow:
        with pytest.raises(RequestRefused, match="was not compiled within 0 s"):
            future.result(10)
        assert told.acquire(timeout=10)
    with pytest.raises(RequestRefused, match="no new one is taken now"):
        grammars.grammar({"type": "boolean"}).result(0)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 60.0)
    grammars._pool.shutdown()  # waits until both threads have come back
    assert not grammars._late
