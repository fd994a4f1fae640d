"""Messages with control tokens go to another server as token ids."""

import asyncio
import json

import pytest
from transformers import AutoTokenizer

from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.errors import UpstreamFailed
from finetune_pipeline.inference.protocol import GenerateRequest
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline_tests.inference.test_remote import WHOLE, fake_upstream, sse
from finetune_pipeline_tests.stories import STORIES, STORIES_GGUF

PLAIN = [{"role": "user", "content": "Once upon a time"}]
HOSTILE = [{"role": "user", "content": "Once </s> upon a time"}]
LEGACY = sse(
    {"choices": [{"text": "Lily", "logprobs": {"tokens": ["Li", "ly"], "token_logprobs": [-0.1, -0.2],
                                               "top_logprobs": [{"Li": -0.1, "To": -3.0}, {"ly": -0.2}]}}]},
    {"choices": [{"text": "", "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}},
    "[DONE]",
)  # fmt: skip


def ask(settings, *requests, vocabulary=STORIES_GGUF):
    """Return the completions of one model's requests, in their order."""

    async def run():
        model = RemoteModel(settings, vocabulary=vocabulary)
        try:
            return [await model.generate(request) for request in requests]
        finally:
            await model.close()

    return asyncio.run(run())


def test_a_message_with_a_control_token_is_sent_as_token_ids():
    schema = {"type": "object"}
    request = GenerateRequest(
        messages=HOSTILE, max_tokens=8, temperature=0.5, seed=3, top_logprobs=2, stop=("x",), json_schema=schema
    )
    with fake_upstream(LEGACY) as (server, settings):
        [answer] = ask(settings, request)
    assert server.paths == ["/v1/completions"]
    [body] = server.asked
    expected = tokenizer_chat_template(AutoTokenizer.from_pretrained(STORIES)).tokens(HOSTILE)
    assert body["prompt"] == expected and "messages" not in body
    assert (body["temperature"], body["seed"], body["stop"], body["logprobs"]) == (0.5, 3, ["x"], 2)
    assert body["json_schema"] == schema and "top_logprobs" not in body
    assert (answer.text, answer.token_texts, answer.token_logprobs) == ("Lily", ["Li", "ly"], [-0.1, -0.2])
    assert [[one.text for one in tokens] for tokens in answer.top_logprobs] == [["Li", "To"], ["ly"]]
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 7, 2)


def test_other_messages_are_sent_as_they_are():
    with fake_upstream(WHOLE) as (server, settings):
        ask(settings, *(GenerateRequest(messages=PLAIN, max_tokens=8) for _ in range(2)))
    assert server.paths == ["/v1/chat/completions"] * 2
    assert server.asked[0]["messages"] == PLAIN


def test_a_request_that_is_canceled_leaves_nothing_to_the_next():
    async def run(settings):
        model = RemoteModel(settings, vocabulary=STORIES_GGUF)
        try:
            first = asyncio.create_task(model.generate(GenerateRequest(messages=HOSTILE, max_tokens=8)))
            await asyncio.sleep(0)  # it has begun to wait for its token ids
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await model.generate(GenerateRequest(messages=PLAIN, max_tokens=8))
        finally:
            await model.close()

    with fake_upstream(WHOLE) as (server, settings):
        asyncio.run(run(settings))
    assert server.paths == ["/v1/chat/completions"]


def test_a_vocabulary_that_cannot_be_read_fails_the_request(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with (
        fake_upstream(WHOLE) as (server, settings),
        pytest.raises(UpstreamFailed, match=r"broken.gguf ended with exit"),
    ):
        ask(settings, GenerateRequest(messages=PLAIN, max_tokens=8), vocabulary=tmp_path / "broken.gguf")
    assert json.dumps(server.asked) == "[]"  # never as messages, which the server could misread
