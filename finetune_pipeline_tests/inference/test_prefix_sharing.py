"""Prompts with the same beginning: it is decoded once, and the answers are those without sharing."""

import pytest

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.inference.scheduler import MIN_SHARED
from finetune_pipeline_tests.stories import STORIES_GGUF

SYSTEM = "Once upon a time there was a big dog. The dog liked to run in the park with Lily and her mom. "
ENDS = ["One day", "Tom saw", "Lily was", "The sun", "Mom said", "It rained", "A cat", "They ran"]


def ask(prompt, max_tokens=24, **fields):
    return GenerateRequest(prompt=prompt, max_tokens=max_tokens, **fields)


def opened(parallel, gguf=STORIES_GGUF):
    return Engine(ModelSpec(gguf=gguf, context=256, parallel=parallel))


@pytest.fixture(scope="module")
def alone():
    """Return the answers of engines that have answered nothing before, and the tokens of the shared beginning."""
    with opened(1) as engine:
        answers = []
        for end in ENDS:
            engine.generate([ask("Z" * 30, 1)])  # nothing of the one before stays in the KV cache
            [answer] = engine.generate([ask(SYSTEM + end)])
            assert answer.cached_tokens <= 1  # <s>
            answers.append(answer)
        return answers, len(engine.tokenize(SYSTEM))


@pytest.mark.parametrize("parallel", [1, 2, 4, 8])
def test_a_shared_beginning_is_decoded_once(alone, parallel):
    expected, shared = alone
    with opened(parallel) as engine:
        answers = engine.generate([ask(SYSTEM + end) for end in ENDS])
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in expected]
    cached = sorted(answer.cached_tokens for answer in answers)
    assert cached[0] <= 1
    assert all(count >= shared - 1 for count in cached[1:])  # the last token may merge with what follows
    for one, other in zip(answers, expected, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=5e-2)


def test_the_same_prompt_again_decodes_its_last_token_only():
    with opened(2) as engine:
        [first], [second] = (engine.generate([ask(SYSTEM + "One day")]) for _ in range(2))
    assert second.cached_tokens == second.prompt_tokens - 1
    assert second.token_ids == first.token_ids


def test_a_swap_of_the_adapter_empties_the_cache():
    with opened(2) as engine:
        [first] = engine.generate([ask(SYSTEM + "One day")])
        engine.swap_adapter(None).result()  # the KV cache was computed with another adapter
        [second] = engine.generate([ask(SYSTEM + "One day")])
    assert second.cached_tokens == 0
    assert second.token_ids == first.token_ids


def test_a_conversation_continues_from_its_last_answer():
    with opened(4) as engine:
        [first] = engine.generate([ask(SYSTEM)])
        others = engine.generate([ask(f"{n} other") for n in range(3)])
        [second] = engine.generate([ask(f"{SYSTEM}{first.text} The end")])
    assert all(answer.cached_tokens <= 1 for answer in others)
    assert second.cached_tokens > first.prompt_tokens


@pytest.mark.parametrize(("length", "copied"), [(MIN_SHARED - 2, False), (MIN_SHARED + 2, True)])
def test_a_short_beginning_is_not_copied(tiny_gguf, length, copied):
    with opened(2, tiny_gguf) as engine:  # one token for each byte
        answers = engine.generate([ask("x" * length + end * 4, 2) for end in "ab"])
    assert [answer.cached_tokens for answer in answers] == [0, length if copied else 0]


def test_a_canceled_request_leaves_what_it_has_decoded(alone):
    expected, _ = alone
    with opened(2) as engine:
        started = engine.submit(ask(SYSTEM + ENDS[0], 200), lambda delta: started.cancel())
        answers = engine.generate([ask(SYSTEM + end) for end in ENDS])
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_sampling_with_a_seed_does_not_depend_on_what_was_asked_before():
    request = ask(SYSTEM + "One day", temperature=1.0, seed=3)
    with opened(2) as engine:
        [first] = engine.generate([request])
        engine.generate([ask(SYSTEM + end) for end in ENDS])
        [second] = engine.generate([request])
    assert second.cached_tokens > 0
    assert second.token_ids == first.token_ids


def test_a_beginning_longer_than_a_batch_is_shared(tiny_gguf):
    asked = [ask("ab" * 600 + end, 3) for end in ("x", "yy", "zzz", "x")]
    with Engine(ModelSpec(gguf=tiny_gguf, context=1500, parallel=4)) as engine:
        first, *others = engine.generate(asked)
    with Engine(ModelSpec(gguf=tiny_gguf, context=1500, parallel=1)) as engine:
        expected = [engine.generate([one])[0].token_ids for one in asked]
    assert first.cached_tokens == 0
    assert all(answer.cached_tokens >= 512 for answer in others)
    assert [answer.token_ids for answer in (first, *others)] == expected
