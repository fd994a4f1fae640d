"""A model behind another server: what is asked of it, and what becomes of servers that fail in every way."""

import asyncio
import json
import math
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.protocol import GenerateRequest
from finetune_pipeline.inference.remote import RemoteModel, UpstreamFailed
from finetune_pipeline.settings import UpstreamSettings

ASK = GenerateRequest(messages=[{"role": "user", "content": "hello"}], max_tokens=8)


class Server(ThreadingHTTPServer):
    """Real HTTP that answers with these very bytes, and remembers what it was asked."""

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
def answering(body, **fields):
    """A server with this answer, and the settings that name it."""
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


def test_an_answer_is_put_together_and_its_pieces_are_told():
    pieces = []
    with answering(WHOLE) as (server, settings):
        answer = ask(settings, on_delta=pieces.append)
    assert (answer.text, pieces, answer.finish_reason) == ('{"a":42}', ['{"a":', "42", "}"], "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 6)
    assert answer.token_texts == ['{"', "a", '":', "4", "2", "}"]
    assert answer.confidence == pytest.approx(math.exp(-0.7))  # of the value, not of its key
    assert server.paths == ["/v1/chat/completions"]


def test_all_that_shapes_an_answer_is_passed_on():
    request = ASK.model_copy(
        update={"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ("x",), "json_schema": {"type": "object"}}
    )
    with answering(WHOLE) as (server, settings):
        ask(settings, request)
        ask(settings)
    asked, plain = server.asked
    assert (asked["model"], asked["messages"], asked["max_tokens"]) == ("m", ASK.messages, 8)
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["stop"]) == (0.5, 0.9, 7, ["x"])
    assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (asked["logprobs"], asked["stream_options"]) == (True, {"include_usage": True})
    assert not {"stop", "response_format", "seed"} & set(plain)


@pytest.mark.parametrize(("given", "expected"), [(None, None), (0, 0), (7, 7)])
def test_the_seed_that_a_server_is_asked_with_is_named_in_the_answer(given, expected):
    request = ASK.model_copy(update={"temperature": 0.5, "seed": given})
    with answering(WHOLE) as (server, settings):
        seeds = [ask(settings, request).seed for _ in range(2)]
        greedy = ask(settings)
    assert [body.get("seed") for body in server.asked] == [*seeds, None]
    assert seeds == [expected] * 2 if given is not None else len(set(seeds)) == 2
    assert greedy.seed is None


def test_the_key_of_the_environment_is_sent_and_a_missing_one_is_said(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "s3cret")
    with answering(WHOLE) as (server, settings):
        ask(settings.model_copy(update={"api_key_env": "OTHER_KEY"}))
        ask(settings)
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
        assert "Authorization" not in server.headers[1]
        monkeypatch.delenv("OTHER_KEY")
        with pytest.raises(UpstreamFailed, match="OTHER_KEY is not set"):
            ask(settings.model_copy(update={"api_key_env": "OTHER_KEY"}))


def test_a_server_without_logprobs_or_usage_gives_an_answer_without_confidence():
    with answering(sse(chunk("hi"), chunk(finish="length"), "[DONE]")) as (_, settings):
        answer = ask(settings)
    assert (answer.text, answer.confidence, answer.finish_reason, answer.prompt_tokens) == ("hi", None, "length", 0)


def test_a_raw_prompt_cannot_be_passed_on():
    with answering(WHOLE) as (server, settings), pytest.raises(RequestRefused, match="ask with messages"):
        ask(settings, GenerateRequest(prompt="x", max_tokens=1))
    assert server.asked == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_server_refuses_is_the_requests_fault(status):
    says = pytest.raises(RequestRefused, match=rf"answered {status}: .*too long")
    with answering('{"error": "too long"}', status=status) as (_, settings), says:
        ask(settings)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 503])
def test_any_other_status_is_the_servers_fault_and_named(status):
    with answering("x" * 10_000, status=status) as (_, settings), pytest.raises(UpstreamFailed) as failed:
        ask(settings)
    assert settings.url in str(failed.value)
    assert len(str(failed.value)) < 600


BROKEN = {
    "nothing": "",
    "html": "<html>hello</html>",
    "no json": sse("{"),
    "a list": sse([1]),
    "no end": sse(chunk("hi")),
    "end without reason": sse(chunk("hi"), "[DONE]"),
    "an error": sse(chunk("hi"), {"error": {"message": "out of memory"}}),
    "choices of another kind": sse({"choices": {"a": 1}}),
    "a choice that is a number": sse({"choices": [7]}),
    "a delta that is a text": sse({"choices": [{"delta": "hi"}]}),
    "content that is a number": sse({"choices": [{"delta": {"content": 7}}]}),
    "tokens without logprobs": sse(chunk("hi", logprobs={"content": [{"token": "hi"}]})),
    "logprobs that are texts": sse(chunk("hi", logprobs=tokens(("hi", "sure"))), chunk(finish="stop")),
    "logprobs that are no numbers": sse(chunk("hi", logprobs=tokens(("hi", float("nan")))), chunk(finish="stop")),
    "usage that is a text": sse({"usage": "much", "choices": []}, chunk("hi"), chunk(finish="stop"), "[DONE]"),
    "deep nesting": "data: " + "[" * 100_000 + "\n\n",
    "no text": b"data: \xff\xfe\n\n",
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_answer_is_the_servers_fault(body):
    with answering(body) as (_, settings), pytest.raises(UpstreamFailed):
        ask(settings)


def test_a_broken_connection_is_the_servers_fault():
    with answering(sse(chunk("hi")), length=10_000) as (_, settings), pytest.raises(UpstreamFailed, match="not answer"):
        ask(settings)


def test_a_server_that_is_silent_is_given_up_after_its_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(UpstreamFailed, match="ReadTimeout"):
            ask(UpstreamSettings(url=url, model="m", timeout_seconds=0.3))


def test_half_a_character_and_strange_counts_do_no_harm():
    body = sse(
        '{"choices": [{"delta": {"content": "a\\ud800b"}}]}',
        chunk(finish="stop"),
        {"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": -1}},
    )
    pieces = []
    with answering(body) as (_, settings):
        answer = ask(settings, on_delta=pieces.append)
    assert (answer.text, pieces) == ("a?b", ["a?b"])
    assert (answer.prompt_tokens, answer.completion_tokens) == (0, 0)


def test_a_name_that_is_no_host_is_the_servers_fault():
    with pytest.raises(UpstreamFailed, match="does not answer"):
        ask(UpstreamSettings(url="http://nowhere.invalid/v1", model="m", timeout_seconds=1))
