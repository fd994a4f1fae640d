"""The checks of every request to the console, before Streamlit sees it: the host, the origin, and the login."""

import html
from urllib.parse import parse_qs, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune_pipeline.console.access import SESSION_SECONDS, ConsoleAccess
from finetune_pipeline.hosts import is_loopback, without_port

COOKIE = "finetune_console"
"""The cookie with the token of a login."""

LOGIN, LOGOUT = "/login", "/logout"
_MAX_FORM = 4_096

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Log in - finetune console</title><style>
:root {{ color-scheme: light dark; font-family: "Source Sans", system-ui, sans-serif }}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0 1rem;
  background: light-dark(#ffffff, #14171c); color: light-dark(#1f2933, #e4e7eb) }}
form {{ width: min(24rem, 100%) }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font-size: 1rem }}
input {{ padding: .6rem; margin: .4rem 0 1rem; border: 1px solid light-dark(#9aa5b1, #52606d); border-radius: .4rem }}
button {{ padding: .6rem; border: 0; border-radius: .4rem; background: #2f6690; color: #fff; cursor: pointer }}
[role=alert] {{ color: light-dark(#a61b1b, #f29b9b) }}
</style></head><body><main><form method="post" action="/login">
<h1>finetune console</h1><p>Log in with an API key that has the scope view, feedback or admin.</p>{problem}
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button></form></main></body></html>"""


class ConsoleGuard:
    """ASGI middleware: rejects foreign hosts and origins, and lets only users in."""

    def __init__(self, app: ASGIApp, access: ConsoleAccess) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or WebSocket."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        answer = await self._refusal(scope, receive)
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        else:
            await answer(scope, receive, send)

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        """Return the response instead of the application's; None if the request may pass."""
        connection = HTTPConnection(scope)
        headers = connection.headers
        host, origin = headers.get("host", ""), headers.get("origin")
        # A web page can send requests to this machine, even under its own domain that resolves to 127.0.0.1.
        if self._access.open and not is_loopback(without_port(host)):
            return PlainTextResponse(
                f"Without API keys the console serves this machine only: found the host {host[:100]!r}, expected "
                "localhost or a loopback address. To use another name, create a key: "
                "finetune key create NAME --scope admin",
                status_code=403,
            )
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return PlainTextResponse(f"Pages of {origin[:100]!r} may not use the console.", status_code=403)
        if self._access.open:
            return None
        path, token = scope["path"], connection.cookies.get(COOKIE, "")
        if path == LOGIN and scope["method"] == "POST":
            return await self._log_in(Request(scope, receive))
        if path == LOGOUT:
            self._access.log_out(token)
            response = RedirectResponse("/", status_code=303)
            response.delete_cookie(COOKIE)
            return response
        if self._access.user(token) is not None:
            return None
        if scope["type"] == "http" and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return _login_page("", 401)
        return PlainTextResponse("Log in first.", status_code=401)

    async def _log_in(self, request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM:
                return PlainTextResponse("The form is too large.", status_code=413)
        secret = parse_qs(body.decode("latin-1")).get("key", [""])[0]
        token = self._access.log_in(secret)
        if token is None:
            return _login_page("No key in use with the scope view, feedback or admin has this secret.", 401)
        response = RedirectResponse("/", status_code=303)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, token, SESSION_SECONDS, httponly=True, secure=secure, samesite="strict")
        return response


def _login_page(problem: str, status: int) -> Response:
    shown = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    headers = {"Cache-Control": "no-store", "Content-Security-Policy": "frame-ancestors 'none'"}
    return HTMLResponse(_PAGE.format(problem=shown), status, headers)
