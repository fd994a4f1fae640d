"""Schemas are compiled in threads with a time limit, and refusals are cached."""

import itertools
import random
import threading

import pytest

from finetune_pipeline.inference import grammar
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import COMPILERS, GrammarCompiler
from finetune_pipeline_tests.waiting import wait_until


class Bytes:
    """A model with a token for each byte, and an end-of-generation token."""

    n_vocab = 257

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b""

    def is_end_of_generation(self, token):
        return token == 256

    def is_control(self, token):
        return token == 256

    def tokenize(self, text):
        return list(text.encode())


class Words(Bytes):
    """The same with 17,576 tokens of three letters."""

    words = [bytes(letters) for letters in itertools.product(range(97, 123), repeat=3)]  # noqa: RUF012
    n_vocab = 257 + len(words)

    def token_bytes(self, token):
        return self.words[token - 257] if token > 256 else super().token_bytes(token)


def test_every_completion_has_its_own_matcher():
    notified = threading.Semaphore(0)
    compiler = GrammarCompiler(Bytes(), notified.release)
    first, second = (compiler.matcher({"type": "boolean"}).result(60) for _ in range(2))
    assert notified.acquire(timeout=60) and notified.acquire(timeout=60)
    assert first.allowed().nonzero()[0].tolist() == [ord("f"), ord("t")]
    first.accept(ord("t"))
    assert first.allowed().nonzero()[0].tolist() == [ord("r")]
    assert second.allowed().nonzero()[0].tolist() == [ord("f"), ord("t")]
    assert second.grammar is first.grammar


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["fire", "fir", 12, None]},
        {"type": "string", "pattern": "^[a-c]{2,4}(é|ö)?$"},
        {"type": "array", "items": {"type": "number", "minimum": -5}, "maxItems": 3},
        {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#"}}, "required": ["a"]},
    ],
    ids=lambda schema: schema.get("type", "enum"),
)
def test_single_tokens_are_allowed_as_in_the_mask_of_all_tokens(schema):
    compiler, random_walk = GrammarCompiler(Bytes(), lambda: None), random.Random(0)
    for _ in range(10):
        matcher = compiler.matcher(schema).result(60)
        for _ in range(30):
            allowed = matcher.allowed()
            alone = [token for token in range(257) if matcher.allows(token)]
            assert {*alone} - {256} == {*allowed.nonzero()[0].tolist()} - {256}
            assert allowed[256] or 256 not in alone, "the end may be found by the mask alone"
            token = random_walk.choice(allowed.nonzero()[0].tolist())
            if token == 256:
                break
            matcher.accept(token)


def test_exhausting_the_lexer_does_not_affect_other_completions():
    compiler = GrammarCompiler(Words(), lambda: None)
    schema = {"type": "string", "pattern": "[a-f].{100}z.{100}q"}

    def write(text):
        matcher = compiler.matcher(schema).result(60)
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


def test_a_refused_schema_stays_refused():
    compiler = GrammarCompiler(Bytes(), lambda: None)
    for _ in range(2):
        with pytest.raises(RequestRefused, match=r"json_schema: the keyword `not` \(at #\) is not supported"):
            compiler.matcher({"not": {}}).result(60)


class Slow(Bytes):
    """A model for which nothing is compiled before `gate` is set."""

    def __init__(self):
        self.gate = threading.Event()

    def token_bytes(self, token):
        self.gate.wait()
        return super().token_bytes(token)


def test_the_schema_of_a_canceled_request_is_not_compiled():
    model = Slow()
    compiler = GrammarCompiler(model, lambda: None)
    running = [compiler.matcher({"title": str(n)}) for n in range(COMPILERS)]
    gone = compiler.matcher({"title": "gone"})
    assert gone.cancel()
    model.gate.set()
    for future in running:
        assert future.result(60).allowed().any()
    compiler._pool.shutdown()
    assert len(compiler._known) == COMPILERS


def test_the_time_for_token_masks_is_limited(monkeypatch):
    matcher = GrammarCompiler(Bytes(), lambda: None).matcher({"type": "integer"}).result(60)
    assert matcher.allowed().any()
    monkeypatch.setattr(grammar, "MASK_SECONDS", 0.0)
    with pytest.raises(RequestRefused, match="masks of the json_schema took more than 0 s"):
        matcher.allowed()


def test_schemas_that_compile_too_long_are_refused_and_do_not_accumulate(monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.05)
    notified = threading.Semaphore(0)
    model = Slow()
    compiler = GrammarCompiler(model, notified.release)
    late = [compiler.matcher({"title": str(n)}) for n in range(COMPILERS + 2)]  # two of them never start
    for future in late:
        with pytest.raises(RequestRefused, match=r"was not compiled within"):
            future.result(60)
        assert notified.acquire(timeout=60)
    with pytest.raises(RequestRefused, match="new ones are refused for now"):
        compiler.matcher({"type": "boolean"}).result(0)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 60.0)
    model.gate.set()
    compiler._pool.submit(int).result(60)
    compiler._pool.submit(int).result(60)
    wait_until(lambda: not compiler._late)
    assert compiler.matcher({"type": "boolean"}).result(60).allowed().any()
    with pytest.raises(RequestRefused, match="was not compiled"):  # a schema that took too long is not tried again
        compiler.matcher({"title": "0"}).result(60)
