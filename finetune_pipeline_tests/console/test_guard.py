"""Who gets into the console: hosts, origins, logins, scopes."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDisconnect

from finetune_pipeline.console.access import ConsoleAccess
from finetune_pipeline.console.guard import COOKIE, ConsoleGuard
from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key, revoke_key


async def _page(_request):
    return PlainTextResponse("the console")


async def _stream(socket):
    await socket.accept()
    await socket.send_text("connected")
    await socket.close()


APP = Starlette(routes=[Route("/", _page), WebSocketRoute("/stream", _stream)])


STREAM = "ws://localhost:8501/stream"


def console(loopback=True):
    access = ConsoleAccess(connect(), loopback=loopback)
    client = TestClient(ConsoleGuard(APP, access), base_url="http://localhost:8501", follow_redirects=False)
    return access, client


def test_without_keys_this_machine_needs_no_login():
    access, client = console()
    assert client.get("/").text == "the console"
    user = access.user(None)
    assert user is not None and user.may("admin") and not user.by_key


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8501", "10.0.0.7", ""])
def test_without_keys_other_hosts_are_refused(host):
    _, client = console()
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 403 and "finetune key create" in answer.text


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:3000", "null"])
def test_pages_of_other_origins_are_refused(origin):
    _, client = console()
    assert client.get("/", headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(STREAM, headers={"origin": origin}):
        pass
    with client.websocket_connect(STREAM, headers={"origin": "http://localhost:8501"}) as socket:
        assert socket.receive_text() == "connected"


def test_a_key_logs_in_and_revoking_it_ends_the_session():
    secret = create_key(connect(), "ann", ["view"])
    access, client = console(loopback=False)
    page = client.get("/", headers={"accept": "text/html"})
    assert page.status_code == 401 and 'name="key"' in page.text
    assert client.get("/").text == "Log in first."
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(STREAM):
        pass
    wrong = client.post("/login", data={"key": "ft-wrong"})
    assert wrong.status_code == 401 and "No key in use" in wrong.text and COOKIE not in wrong.cookies
    answer = client.post("/login", data={"key": secret})
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and secret not in cookie
    assert client.get("/").text == "the console"
    user = access.user(client.cookies[COOKIE])
    assert (user.name, user.may("view"), user.may("feedback")) == ("ann", True, False)
    revoke_key(connect(), "ann")
    access._read_at = -1.0  # half a second later
    assert client.get("/").status_code == 401


def test_logging_out_ends_the_session():
    secret = create_key(connect(), "ann", ["admin"])
    _, client = console()
    client.post("/login", data={"key": secret})
    token = client.cookies[COOKIE]
    assert client.get("/").status_code == 200
    client.get("/logout")
    assert client.get("/", headers={"cookie": f"{COOKIE}={token}"}).status_code == 401


def test_a_key_that_may_only_ask_models_cannot_log_in():
    secret = create_key(connect(), "app", ["infer"])
    access, client = console(loopback=False)
    assert client.post("/login", data={"key": secret}).status_code == 401
    assert not access.has_keys


def test_a_form_that_is_too_large_is_refused():
    create_key(connect(), "ann", ["admin"])
    _, client = console()
    assert client.post("/login", data={"key": "x" * 10_000}).status_code == 413
