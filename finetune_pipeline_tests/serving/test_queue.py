"""Full queues, slow clients, and clients that disconnect."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from finetune_pipeline_tests.serving.conftest import LONG, PROMPT, Running, events, make_loop, serving
from finetune_pipeline_tests.waiting import wait_until

FORMAT = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": LONG}}
TOKENS = 450
"""As many as the context allows; takes about a third of a second on an idle machine."""


@pytest.fixture(scope="module")
def narrow(own_home):
    """Run a gateway with one slot and a queue of one."""
    with serving(make_loop(serving={"parallel": 1, "queue": 1})) as running:
        yield running


def long_answer(running: Running, **fields):
    return running.ask("count", response_format=FORMAT, max_tokens=TOKENS, **fields)


def in_flight(running: Running) -> float:
    return running.metric("finetune_in_flight", loop="notes")


def send(running: Running, stream: bool, **fields) -> socket.socket:
    """Send a request through a socket and read nothing."""
    body = {"model": "notes", "messages": [{"role": "user", "content": "count"}], "stream": stream, **fields}
    body |= {"response_format": FORMAT, "max_tokens": TOKENS}
    raw = json.dumps(body).encode()
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_requests_beyond_the_queue_get_503_with_retry_after(narrow, stream):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: long_answer(narrow, stream=stream), range(8)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert 2 <= statuses.count(200) <= 6
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "overloaded"
        else:
            assert not stream or len(events(answer)) > 10
    assert in_flight(narrow) == 0


def test_the_official_client_retries_and_is_answered(narrow):
    client = narrow.openai(max_retries=8)
    ask = lambda _: client.chat.completions.create(  # noqa: E731
        model="notes", messages=[{"role": "user", "content": PROMPT}], max_tokens=8
    )
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(ask, range(4)))) == 4


def test_a_full_queue_raises_the_clients_internal_server_error(narrow):
    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(long_answer, narrow) for _ in range(2)]
        wait_until(lambda: in_flight(narrow) == 2)
        with pytest.raises(openai.InternalServerError, match="notes@base has 2 requests and takes no more") as refused:
            narrow.openai().chat.completions.create(model="notes", messages=[{"role": "user", "content": "x"}])
        assert refused.value.response.headers["retry-after"] == "1"
        assert [each.result().status_code for each in busy] == [200, 200]


def test_a_client_that_does_not_read_its_stream_delays_nobody(narrow):
    answered = narrow.metric("finetune_answers_total", loop="notes")
    slow = [send(narrow, stream=True)]
    wait_until(lambda: narrow.metric("finetune_answers_total", loop="notes") == answered + 1)
    slow.append(send(narrow, stream=True))
    assert narrow.ask(PROMPT).status_code == 200  # although nobody reads the streams
    wait_until(lambda: in_flight(narrow) == 0)
    for connection in slow:  # the rest of the stream is still available
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        text = b""
        while b"data: [DONE]" not in text:
            chunk = connection.recv(65536)
            assert chunk, f"the stream is incomplete: {text[-300:]!r}"
            text += chunk
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slot(narrow, stream):
    abandoned = narrow.metric("finetune_abandoned_total", loop="notes")
    gone = [send(narrow, stream=stream), send(narrow, stream=stream)]
    wait_until(lambda: in_flight(narrow) == 2)
    if stream:
        assert gone[0].recv(100).startswith(b"HTTP/1.1 200")
    for connection in gone:
        connection.close()
    wait_until(lambda: in_flight(narrow) == 0)
    assert narrow.ask(PROMPT).status_code == 200
    assert narrow.metric("finetune_abandoned_total", loop="notes") == abandoned + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_is_not_an_error(narrow, caplog, stream):
    failed = narrow.metric("finetune_requests_total", status="500")
    for _ in range(5):
        connection = send(narrow, stream=stream)
        wait_until(lambda: in_flight(narrow) == 1)
        if stream:
            connection.recv(100)
        connection.close()
        wait_until(lambda: in_flight(narrow) == 0)
    assert narrow.metric("finetune_requests_total", status="500") == failed
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_many_clients_share_the_batch(own_home):
    with serving(make_loop("wide", serving={"parallel": 8})) as gateway, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: gateway.ask(f"{100 + n} mm brick wall", model="wide").json(), range(24)))
        assert len({answer["id"] for answer in answers}) == 24
        kept = [gateway.interaction(answer["id"])["interaction"] for answer in answers]
        assert [one["output"] for one in kept] == [a["choices"][0]["message"]["content"] for a in answers]
        assert [one["prompt"] for one in kept] == [f"{100 + n} mm brick wall" for n in range(24)]
