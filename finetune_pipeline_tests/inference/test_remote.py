"""The client of another OpenAI-compatible server, with servers that fail in many ways."""

import asyncio
import json
import math
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_pipeline.inference.errors import ContextExceeded, RequestRefused
from finetune_pipeline.inference.protocol import GenerateRequest
from finetune_pipeline.inference.remote import RemoteModel, UpstreamFailed
from finetune_pipeline.settings import UpstreamSettings

ASK = GenerateRequest(messages=[{"role": "user", "content": "hello"}], max_tokens=8)


class Server(ThreadingHTTPServer):
    """An HTTP server that returns these bytes and records the requests."""

    def __init__(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body, self.status, self.length = body, status, length
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        self.send_response(self.server.status)
        if self.server.length is not None:
            self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@contextmanager
def fake_upstream(body, **fields):
    """Yield a server with this response, and the settings for it."""
    with Server(body if isinstance(body, bytes) else body.encode(), **fields) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield (
                server,
                UpstreamSettings(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", timeout_seconds=2),
            )
        finally:
            server.shutdown()
            thread.join()


def sse(*chunks):
    return "".join(f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks)


def chunk(text=None, finish=None, **fields):
    return {"choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish, **fields}]}


def tokens(*pairs):
    return {"content": [{"token": token, "logprob": logprob} for token, logprob in pairs]}


WHOLE = sse(
    {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    chunk('{"a":', logprobs=tokens(('{"', -0.1), ("a", -5.0), ('":', -0.1))),
    chunk("42", logprobs=tokens(("4", -0.2), ("2", -0.7))),
    chunk("}", logprobs=tokens(("}", -3.0))),
    chunk(finish="stop"),
    {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 6}},
    "[DONE]",
)


def ask(settings, request=ASK, on_delta=None):
    async def once():
        model = RemoteModel(settings)
        try:
            return await model.generate(request, on_delta)
        finally:
            await model.close()

    return asyncio.run(once())


def test_a_completion_is_assembled_from_its_deltas():
    deltas = []
    with fake_upstream(WHOLE) as (server, settings):
        answer = ask(settings, on_delta=lambda delta: deltas.append(delta.text))
    assert (answer.text, deltas, answer.finish_reason) == ('{"a":42}', ['{"a":', "42", "}"], "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 6)
    assert answer.token_texts == ['{"', "a", '":', "4", "2", "}"]
    assert answer.confidence == pytest.approx(math.exp(-0.7))  # of the value, not of its key
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("delta", "error"),
    [
        ({"refusal": "I cannot."}, RequestRefused),
        ({"content": None, "tool_calls": [{"index": 0, "id": "1"}]}, UpstreamFailed),
        ({"function_call": {"name": "f"}}, UpstreamFailed),
    ],
)
def test_a_refusal_or_a_tool_call_is_an_error_and_no_empty_answer(delta, error):
    stream = sse({"choices": [{"delta": delta, "finish_reason": None}]}, chunk(finish="stop"), "[DONE]")
    with fake_upstream(stream) as (_, settings), pytest.raises(error, match=r"refuses: 'I cannot\.'|tool call"):
        ask(settings)


def test_all_generation_parameters_are_sent():
    request = ASK.model_copy(
        update={"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ("x",), "json_schema": {"type": "object"}}
    )
    with fake_upstream(WHOLE) as (server, settings):
        ask(settings, request)
        ask(settings)
    asked, plain = server.asked
    assert (asked["model"], asked["messages"], asked["max_tokens"]) == ("m", ASK.messages, 8)
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["stop"]) == (0.5, 0.9, 7, ["x"])
    assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (asked["logprobs"], asked["stream_options"]) == (True, {"include_usage": True})
    assert not {"stop", "response_format", "seed"} & set(plain)


@pytest.mark.parametrize(("given", "expected"), [(None, None), (0, 0), (7, 7)])
def test_the_seed_that_was_sent_is_in_the_completion(given, expected):
    request = ASK.model_copy(update={"temperature": 0.5, "seed": given})
    with fake_upstream(WHOLE) as (server, settings):
        seeds = [ask(settings, request).seed for _ in range(2)]
        greedy = ask(settings)
    assert [body.get("seed") for body in server.asked] == [*seeds, None]
    assert seeds == [expected] * 2 if given is not None else len(set(seeds)) == 2
    assert greedy.seed is None


def test_the_api_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "s3cret")
    with fake_upstream(WHOLE) as (server, settings):
        ask(settings.model_copy(update={"api_key_env": "OTHER_KEY"}))
        ask(settings)
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
        assert "Authorization" not in server.headers[1]
        monkeypatch.delenv("OTHER_KEY")
        with pytest.raises(UpstreamFailed, match="OTHER_KEY is not set"):
            ask(settings.model_copy(update={"api_key_env": "OTHER_KEY"}))


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"top_k": 5, "min_p": 0.1, "typical_p": 0.5}, {"top_k": 5, "min_p": 0.1, "typical_p": 0.5}),
        ({"presence_penalty": 1.0, "frequency_penalty": -1.0}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
        ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5, "repetition_penalty": 1.5}),
        ({"logit_bias": {5: 2.5, 7: None}}, {"logit_bias": {"5": 2.5, "7": -100}}),
        ({"ignore_eos": True, "top_logprobs": 3}, {"ignore_eos": True, "top_logprobs": 3}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"prefill": "Once"},
            {
                "messages": [*ASK.messages, {"role": "assistant", "content": "Once"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
        ),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_parameters_that_not_every_server_knows_are_sent_only_if_given(fields, sent):
    with fake_upstream(WHOLE) as (server, settings):
        ask(settings, ASK.model_copy(update=fields))
        ask(settings)
    given, plain = server.asked
    assert given == {**plain, **sent}


def test_deltas_have_their_tokens_and_the_most_probable_ones():
    top = [{"token": "4", "logprob": -0.2, "bytes": [52]}, {"token": "5", "logprob": -1.9, "bytes": None}]
    token = {"token": "4", "logprob": -0.2, "top_logprobs": top}
    deltas = []
    with fake_upstream(sse(chunk("4", logprobs={"content": [token]}), chunk(finish="stop"), "[DONE]")) as (_, settings):
        answer = ask(settings, ASK.model_copy(update={"logprobs": True, "top_logprobs": 2}), deltas.append)
    [delta] = deltas
    assert (delta.text, delta.token_texts, delta.token_logprobs) == ("4", ["4"], [-0.2])
    assert [(one.text, one.logprob, one.bytes) for one in delta.top_logprobs[0]] == [
        ("4", -0.2, [52]),
        ("5", -1.9, [53]),
    ]
    assert answer.top_logprobs == delta.top_logprobs


@pytest.mark.parametrize(
    "reply",
    [
        '{"error": {"code": "context_length_exceeded", "message": "too long"}}',
        '{"error": {"type": "exceed_context_size_error", "message": "too long"}}',
        '{"message": "This model\'s maximum context length is 8 tokens."}',
    ],
    ids=["OpenAI", "llama-server", "vLLM"],
)
def test_a_prompt_that_is_too_long_for_the_other_server_is_recognized(reply):
    with fake_upstream(reply, status=400) as (_, settings), pytest.raises(ContextExceeded, match="returned status 400"):
        ask(settings)


def test_without_logprobs_there_is_no_confidence():
    with fake_upstream(sse(chunk("hi"), chunk(finish="length"), "[DONE]")) as (_, settings):
        answer = ask(settings)
    assert (answer.text, answer.confidence, answer.finish_reason, answer.prompt_tokens) == ("hi", None, "length", 0)


def test_a_raw_prompt_cannot_be_sent():
    with fake_upstream(WHOLE) as (server, settings), pytest.raises(RequestRefused, match="send messages"):
        ask(settings, GenerateRequest(prompt="x", max_tokens=1))
    assert server.asked == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_error_refuses_the_request(status):
    reason = pytest.raises(RequestRefused, match=rf"returned status {status}: .*too long")
    with fake_upstream('{"error": "too long"}', status=status) as (_, settings), reason:
        ask(settings)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 503])
def test_any_other_status_is_an_upstream_failure(status):
    with fake_upstream("x" * 10_000, status=status) as (_, settings), pytest.raises(UpstreamFailed) as failed:
        ask(settings)
    assert settings.url in str(failed.value)
    assert len(str(failed.value)) < 600


BROKEN = {
    "nothing": "",
    "html": "<html>hello</html>",
    "invalid json": sse("{"),
    "a list": sse([1]),
    "no end": sse(chunk("hi")),
    "end without reason": sse(chunk("hi"), "[DONE]"),
    "an error": sse(chunk("hi"), {"error": {"message": "out of memory"}}),
    "choices of another type": sse({"choices": {"a": 1}}),
    "a choice that is a number": sse({"choices": [7]}),
    "a delta that is a string": sse({"choices": [{"delta": "hi"}]}),
    "content that is a number": sse({"choices": [{"delta": {"content": 7}}]}),
    "tokens without logprobs": sse(chunk("hi", logprobs={"content": [{"token": "hi"}]})),
    "logprobs that are strings": sse(chunk("hi", logprobs=tokens(("hi", "sure"))), chunk(finish="stop")),
    "logprobs that are NaN": sse(chunk("hi", logprobs=tokens(("hi", float("nan")))), chunk(finish="stop")),
    "usage that is a string": sse({"usage": "much", "choices": []}, chunk("hi"), chunk(finish="stop"), "[DONE]"),
    "deep nesting": "data: " + "[" * 100_000 + "\n\n",
    "invalid UTF-8": b"data: \xff\xfe\n\n",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_an_invalid_stream_is_an_upstream_failure(body):
    with fake_upstream(body) as (_, settings), pytest.raises(UpstreamFailed):
        ask(settings)


def test_a_broken_connection_is_an_upstream_failure():
    with (
        fake_upstream(sse(chunk("hi")), length=10_000) as (_, settings),
        pytest.raises(UpstreamFailed, match="not answer"),
    ):
        ask(settings)


def test_a_silent_server_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(UpstreamFailed, match="ReadTimeout"):
            ask(UpstreamSettings(url=url, model="m", timeout_seconds=0.3))


def test_surrogates_and_invalid_counts_are_replaced():
    body = sse(
        '{"choices": [{"delta": {"content": "a\\ud800b"}}]}',
        chunk(finish="stop"),
        {"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": -1}},
    )
    deltas = []
    with fake_upstream(body) as (_, settings):
        answer = ask(settings, on_delta=lambda delta: deltas.append(delta.text))
    assert (answer.text, deltas) == ("a?b", ["a?b"])
    assert (answer.prompt_tokens, answer.completion_tokens) == (0, 0)


def test_an_unknown_host_is_an_upstream_failure():
    with pytest.raises(UpstreamFailed, match="does not answer"):
        ask(UpstreamSettings(url="http://nowhere.invalid/v1", model="m", timeout_seconds=1))
