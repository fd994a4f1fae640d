"""Limits of connections: size and time of heads and bodies, idle connections, and their number."""

import asyncio
import contextlib
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.serving import http as serving_http
from finetune_pipeline.serving.connections import MAX_HEAD, ConnectionLimits
from finetune_pipeline.settings import load_loop
from finetune_pipeline_tests.serving.conftest import PROMPT, free_port, make_loop, process, serving
from finetune_pipeline_tests.waiting import wait_until

MEGABYTE = 2**20
CHAT = {"model": "notes", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def connect_to(running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_all(connection) -> bytes:
    """Return what the gateway sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def read_response(connection) -> bytes:
    """Return one response with a Content-Length."""
    received = b""
    while True:
        head, end, body = received.partition(b"\r\n\r\n")
        if end and len(body) >= int(re.search(rb"content-length: (\d+)", head)[1]):
            return received
        part = connection.recv(65536)
        assert part, received
        received += part


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def error_of(response: bytes) -> dict:
    return json.loads(response.partition(b"\r\n\r\n")[2])["error"]


# ---- size


@pytest.fixture(scope="module")
def gateway_process(own_home):
    base_gguf(load_loop("aec_parser"), print)
    with process(port=free_port()) as (running, started):
        running.http.get("/healthz")
        yield running, psutil.Process(started.pid)


ENDLESS = {
    "a line": (b"GET /v1/models?", b"x" * 65536),
    "a header": (GET + b"X-Long: ", b"x" * 65536),
    "a header's name": (GET, b"x" * 65536),
    "headers": (GET, b"X-Some: x\r\n" * 6000),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Some: x\r\n" * 6000),
    "a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX-Long: ", b"x" * 65536),
    "a chunk's extension": (CHUNKED + b"2;", b"x" * 65536),
    "empty lines": (b"", b"\r\n" * 32768),
    "pipelined requests": (b"", (GET + b"\r\n") * 1000),
}


@pytest.mark.parametrize("form", ENDLESS)
def test_200_megabytes_that_are_no_body_take_no_memory(gateway_process, form):
    running, gateway = gateway_process
    start, rest = ENDLESS[form]
    memory = gateway.memory_info().rss
    with connect_to(running) as connection, ThreadPoolExecutor(1) as pool:
        received = pool.submit(read_all, connection)
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(start)
            for _ in range(200 * MEGABYTE // len(rest)):
                connection.sendall(rest)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        response = received.result()
    assert gateway.memory_info().rss - memory < 30 * MEGABYTE
    if form not in ("pipelined requests", "trailers", "a trailer") and response:  # else TCP has reset the connection
        assert status(response) in (400, 431)
    assert running.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("where", ["line", "one header", "many headers"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_head_has_64_kilobytes(notes, where, fits):
    size = MAX_HEAD - 2000 if fits else MAX_HEAD + 1
    match where:
        case "line":
            start = b"GET /v1/models?" + b"x" * (size - 15) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        case "one header":
            start = GET + b"X-Long: " + b"x" * size + b"\r\n\r\n"
        case "many headers":
            start = GET + b"X-Some: xxxx\r\n" * (size // 10) + b"\r\n"
    with connect_to(notes) as connection:
        connection.sendall(start)
        response = read_response(connection)
    assert status(response) == (200 if fits else 431)
    if not fits:
        assert error_of(response)["code"] == "headers_too_large"


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"x" * 200])
def test_what_is_not_http_gets_an_error_in_the_usual_format(notes, data):
    with connect_to(notes) as connection:
        connection.sendall(data)
        response = read_response(connection)
        assert (status(response), error_of(response)["code"]) == (400, "invalid_request")


def test_trailers_and_extensions_of_chunks_are_ignored(notes):
    body = json.dumps(CHAT).encode()
    with connect_to(notes) as connection:
        for _ in range(2):  # the connection stays usable
            connection.sendall(CHUNKED + b"%x;a=b\r\n%s\r\n0\r\nHost: evil.example\r\n\r\n" % (len(body), body))
            assert status(read_response(connection)) == 200


def test_pipelined_requests_are_answered_in_order(notes):
    paths = [b"/v1/models", b"/nothing", b"/healthz", b"/v1/nothing"]
    with connect_to(notes) as connection:
        connection.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths))
        received = b""
        while received.count(b"HTTP/1.1 ") < len(paths):
            received += connection.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404", b"200", b"404"]


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored(notes, upgrade):
    body = json.dumps(CHAT).encode()
    upgrading = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AA\r\n" % upgrade
    with connect_to(notes) as connection:  # as Java's client does in its first request
        connection.sendall(POST + upgrading + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert status(read_response(connection)) == 200


# ---- memory of bodies


@pytest.mark.parametrize("chunked", [False, True])
def test_all_bodies_together_are_limited(notes, monkeypatch, chunked):
    monkeypatch.setattr(serving_http, "MAX_BODIES", 4 * MEGABYTE)
    part = b" " * (3 * MEGABYTE // 2)
    waiting = [connect_to(notes) for _ in range(2)]
    head = CHUNKED if chunked else POST + b"Content-Length: %d\r\n\r\n" % (len(part) + 2)
    first = b"%x\r\n%s\r\n" % (len(part), part) if chunked else part
    for connection in waiting:
        connection.sendall(head + first)
    guard = notes.guard
    wait_until(lambda: guard._body_bytes == 2 * len(part))
    refused = notes.http.post("/v1/chat/completions", content=part, headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert notes.http.post("/v1/chat/completions", json=CHAT).status_code == 200  # a small one still fits
    for connection in waiting:
        connection.sendall(b"2\r\n{}\r\n0\r\n\r\n" if chunked else b"{}")
        assert status(read_response(connection)) == 400  # it was read completely
        connection.close()
    wait_until(lambda: guard._body_bytes == 0)


def test_a_body_whose_client_disconnects_is_released(notes, caplog):
    with connect_to(notes) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        wait_until(lambda: notes.guard._body_bytes == 1)
    wait_until(lambda: notes.guard._body_bytes == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# ---- time


@pytest.fixture(scope="module")
def impatient(notes):
    seconds = {"head": 2, "body": 2, "idle": 3, "refused": 1}
    limits = ConnectionLimits(seconds=seconds, unsent_seconds=2, watch_seconds=0.1)
    with serving(make_loop(), limits=limits) as running:
        yield running


SLOW = {
    "nothing": (b"", None),
    "a part of the line": (b"GET /v1", 408),
    "a part of the headers": (GET + b"X-Some: ", 408),
    "empty lines": (b"\r\n\r\n", 408),
    "no body": (POST + b"Content-Length: 10\r\n\r\n", 408),
    "a part of the body": (POST + b"Content-Length: 10\r\n\r\n{", 408),
    "a part of a chunk": (CHUNKED + b"9\r\n{", 408),
    "no last chunk": (CHUNKED + b"2\r\n{}\r\n", 408),
    "no end of the trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nX-Some: x\r\n", 408),
}


@pytest.fixture(scope="module")
def slow_responses(impatient):
    """Return what the gateway sends until it closes the connection, by form and number of the request."""

    def respond(case: tuple[str, int]) -> bytes:
        form, number = case
        with connect_to(impatient) as connection:
            for _ in range(number - 1):
                connection.sendall(GET + b"\r\n")
                read_response(connection)
            connection.sendall(SLOW[form][0])
            return read_all(connection)

    cases = [(form, number) for form in SLOW for number in (1, 2)]
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(respond, cases), strict=True))


@pytest.mark.parametrize("form", SLOW)
@pytest.mark.parametrize("number", [1, 2])
def test_an_incomplete_request_ends(slow_responses, form, number):
    expected, response = SLOW[form][1], slow_responses[form, number]
    assert (status(response) if response else None) == expected
    if expected:
        assert error_of(response)["code"] == "request_timeout"


@pytest.mark.parametrize("start", [GET + b"X-Slow: ", POST + b"Content-Length: 1000000\r\n\r\n", b"\r\n"])
def test_a_byte_now_and_then_does_not_keep_a_connection(impatient, start):
    with connect_to(impatient) as connection:
        connection.sendall(start)
        connection.settimeout(0.1)
        received = b""
        while not received:
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"\n" if start == b"\r\n" else b"x")
        assert status(received) == 408


@pytest.mark.parametrize("rest", [0, 1000, 3 * MEGABYTE])
def test_a_request_that_was_refused_early_does_not_keep_its_connection(impatient, rest):
    with connect_to(impatient) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % (3 * MEGABYTE))
        assert status(read_response(connection)) == 413
        connection.sendall(b" " * rest)
        assert read_all(connection) == b""


def test_a_client_that_reads_nothing_does_not_keep_its_connection(impatient):
    script = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect_to(impatient) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(script * 16)  # more than the buffers of both sockets
        assert connection.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: not impatient.server.server_state.connections)


def test_an_answer_may_take_longer_than_its_request(impatient):
    server, loop = impatient.gateway.servers["notes"], impatient.gateway._refreshing[0].get_loop()
    loop.call_soon_threadsafe(server._no_swap.clear)  # as while an adapter is swapped
    with connect_to(impatient) as connection:
        body = json.dumps(CHAT).encode()
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        with connect_to(impatient) as idle:  # closed after longer than all limits
            assert read_all(idle) == b""
        loop.call_soon_threadsafe(server._no_swap.set)
        assert status(read_response(connection)) == 200


POOLS = {"undici": 4, "httpx and openai": 5, "aiohttp": 15, "Java": 30, "nginx and .NET": 60, "Go": 90}


@pytest.mark.parametrize("client", POOLS)
def test_idle_connections_outlive_the_pools_of_clients(client):
    assert ConnectionLimits().seconds["idle"] > POOLS[client]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
def test_an_idle_connection_is_used_until_the_clients_pool_drops_it(impatient, path):
    """With times shortened 45 times: a pool of 2 s (Go's 90 s) within the gateway's 3 s (default 120 s)."""
    pool, body = 2.0, json.dumps(CHAT).encode()
    request = GET + b"\r\n" if path == "/v1/models" else POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connect_to(impatient) as connection:
        for _ in range(3):
            connection.sendall(request)
            assert status(read_response(connection)) == 200
            connection.settimeout(pool)
            with pytest.raises(TimeoutError):  # it is not closed while the client could use it again
                connection.recv(1)
            connection.settimeout(60)
        assert connection.recv(1) == b""  # after that, the gateway closes it


# ---- number


@pytest.fixture
def few(notes):
    with serving(make_loop(), limits=ConnectionLimits(connections=4)) as running:
        yield running


@pytest.mark.parametrize("data", [b"", GET, POST + b"Content-Length: 10\r\n\r\n", GET + b"\r\n"])
def test_connections_that_wait_for_their_clients_make_room(few, data):
    held = [connect_to(few) for _ in range(10)]
    for connection in held:
        connection.sendall(data)
    assert few.ask(max_tokens=4).status_code == 200
    wait_until(lambda: len(few.server.server_state.connections) <= 4)
    assert few.ask(max_tokens=4).status_code == 200
    for connection in held:
        connection.close()


def test_connections_that_wait_for_answers_are_kept(few):
    server, loop = few.gateway.servers["notes"], few.gateway._refreshing[0].get_loop()
    loop.call_soon_threadsafe(server._no_swap.clear)
    body = json.dumps(CHAT).encode()
    held = [connect_to(few) for _ in range(4)]
    for connection in held:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: server._waiting_for_swap == 4)
    for _ in range(3):
        with connect_to(few) as refused:
            response = read_response(refused)
            assert (status(response), error_of(response)["code"]) == (503, "overloaded")
            assert b"retry-after: 1" in response
    loop.call_soon_threadsafe(server._no_swap.set)
    for connection in held:
        assert status(read_response(connection)) == 200
        connection.close()


# ---- overload


@pytest.mark.timeout(1800)
def test_200_simultaneous_requests_of_the_official_client_are_answered_in_bounded_memory(gateway_process):
    running, gateway = gateway_process

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=2) as client:
            requests = [client.chat.completions.create(**{**CHAT, "model": "aec_parser"}) for _ in range(200)]
            return [answer.id for answer in await asyncio.gather(*requests)]

    memory = []

    def settled() -> bool:
        """Return whether the last five rounds took little more; a leak of 20 KB per request would take more."""
        return len(memory) > 5 and memory[-1] - memory[-6] < 20 * MEGABYTE

    # Buffers and caches grow to what 200 requests at once need: over four rounds on a quiet machine, in steps that
    # come later on a busy one, and no further.
    while not settled():
        assert len(memory) < 24, memory
        assert len(set(asyncio.run(ask_all()))) == 200
        memory.append(sum(one.memory_info().rss for one in (gateway, *gateway.children(recursive=True))))
