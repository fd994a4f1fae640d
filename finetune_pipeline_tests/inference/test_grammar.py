"""Compiling schemas: with a time limit, never more at a time than there are threads, and refusals are kept."""

import itertools
import random
import threading

import pytest

from finetune_pipeline.inference import grammar
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import COMPILERS, Grammars


class Bytes:
    """A model with a token for each byte, and one that ends an answer."""

    n_vocab = 257

    def piece(self, token):
        return bytes([token]) if token < 256 else b""

    def ends(self, token):
        return token == 256

    def is_marker(self, token):
        return token == 256

    def tokenize(self, text):
        return list(text.encode())


class Words(Bytes):
    """The same with 17,576 tokens of three letters."""

    words = [bytes(letters) for letters in itertools.product(range(97, 123), repeat=3)]  # noqa: RUF012
    n_vocab = 257 + len(words)

    def piece(self, token):
        return self.words[token - 257] if token > 256 else super().piece(token)


def test_every_answer_has_a_matcher_of_its_own():
    told = threading.Semaphore(0)
    grammars = Grammars(Bytes(), told.release)
    first, second = (grammars.matcher({"type": "boolean"}).result(10) for _ in range(2))
    assert told.acquire(timeout=10) and told.acquire(timeout=10)
    assert first.allowed().nonzero()[0].tolist() == [ord("f"), ord("t")]
    first.accept(ord("t"))
    assert first.allowed().nonzero()[0].tolist() == [ord("r")]
    assert second.allowed().nonzero()[0].tolist() == [ord("f"), ord("t")]
    assert second.grammar is first.grammar


def test_an_answer_that_exhausts_the_lexer_leaves_others_of_its_schema_alone():
    grammars = Grammars(Words(), lambda: None)
    schema = {"type": "string", "pattern": "[a-f].{100}z.{100}q"}

    def write(text):
        matcher = grammars.matcher(schema).result(10)
        for token in text:
            matcher.allowed()
            matcher.accept(token)
        return matcher.allowed()

    with pytest.raises(RequestRefused, match="cannot be enforced to the end"):
        write(
            [
                ord('"'),
                *random.Random(1).choices(
                    [n for n, word in enumerate(Words.words, 257) if {*word} <= {*b"abcdefz"}], k=3000
                ),
            ]
        )
    assert write(b'"abc').any()


def test_a_schema_that_is_refused_stays_refused():
    grammars = Grammars(Bytes(), lambda: None)
    for _ in range(2):
        with pytest.raises(RequestRefused, match="json_schema at #: not"):
            grammars.matcher({"not": {}}).result(10)


class Slow(Bytes):
    """A model for which nothing is compiled before `gate` is set."""

    def __init__(self):
        self.gate = threading.Event()

    def piece(self, token):
        self.gate.wait()
        return super().piece(token)


def test_a_schema_whose_request_is_gone_is_not_compiled():
    model = Slow()
    grammars = Grammars(model, lambda: None)
    running = [grammars.matcher({"title": str(n)}) for n in range(COMPILERS)]
    gone = grammars.matcher({"title": "gone"})
    assert gone.cancel()
    model.gate.set()
    for future in running:
        assert future.result(60).allowed().any()
    grammars._pool.shutdown()
    assert len(grammars._known) == COMPILERS


def test_the_time_that_masks_take_is_limited(monkeypatch):
    matcher = Grammars(Bytes(), lambda: None).matcher({"type": "integer"}).result(60)
    assert matcher.allowed().any()
    monkeypatch.setattr(grammar, "MASK_SECONDS", 0.0)
    with pytest.raises(RequestRefused, match="masks of the json_schema took more than 0 s"):
        matcher.allowed()


def test_a_compilation_beyond_its_time_fails_its_request_and_does_not_accumulate(monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.05)
    told = threading.Semaphore(0)
    model = Slow()
    grammars = Grammars(model, told.release)
    late = [grammars.matcher({"title": str(n)}) for n in range(COMPILERS + 2)]  # two of them never begin
    for future in late:
        with pytest.raises(RequestRefused, match=r"was not compiled within"):
            future.result(10)
        assert told.acquire(timeout=10)
    with pytest.raises(RequestRefused, match="new ones are refused for now"):
        grammars.matcher({"type": "boolean"}).result(0)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 60.0)
    model.gate.set()
    grammars._pool.submit(int).result(60)
    grammars._pool.submit(int).result(60)
    while grammars._late:
        threading.Event().wait(0.01)
    assert grammars.matcher({"type": "boolean"}).result(60).allowed().any()
    with pytest.raises(RequestRefused, match="was not compiled"):  # what took too long is not tried again
        grammars.matcher({"title": "0"}).result(60)
