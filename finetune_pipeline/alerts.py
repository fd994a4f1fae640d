"""Alerts: tell people about a loop, in the log, to a webhook and to Slack, once per event.

Whatever happens to a receiver, the caller goes on: an alert that could not be sent is logged, and kept with the reason
in the table `alerts`, which `finetune alerts` shows. Alerts have numbers, names and paths, and no text of examples.
"""

import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import Database, DatabaseError, connect
from finetune_pipeline.database.statements import insert
from finetune_pipeline.database.tables import alerts
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.settings import AlertKind, AlertSettings, LoopSettings, with_loop
from finetune_pipeline.wording import error_line, first_line

_log = logging.getLogger(__name__)

_MAX_TEXT = 3_000  # characters; longer messages are cut by chat programs
_MAX_KEY = 200
_DATABASE_ERRORS = (DatabaseError, sa.exc.SQLAlchemyError, OSError)


@dataclass(frozen=True)
class Alert:
    """What people are told about one event of a loop.

    Attributes:
        kind: what `alerts.kinds` selects by.
        key: names the event in the loop; an alert of the same key is sent once. At most 200 characters.
        title: what happened, in one sentence without a full stop that names the loop or the model.
        text: the numbers, and what to do next; lines. No text of examples.
        link: path or URL of what has the details, such as the report; empty if there is none.
    """

    kind: AlertKind
    key: str
    title: str
    text: str
    link: str = ""


class SentAlert(Record):
    """An alert in the history.

    Attributes:
        deliveries: receiver -> why it did not get the alert, empty if it did; None if the process ended while sending.
    """

    loop: str
    kind: str
    key: str
    title: str
    text: str
    link: str
    created_at: UtcDatetime
    deliveries: dict[str, str] | None


def send(loop: LoopSettings, alert: Alert) -> bool:
    """Send an alert to the log and the receivers in the loop's settings, unless it was sent before.

    It waits for receivers for at most `alerts.timeout_seconds`, and raises no error for one that is down, slow or
    refuses, or for a database that cannot be written.

    Returns:
        Whether it is sent now. False: the settings do not select its kind, or its key was sent before.
    """
    if alert.kind not in loop.alerts.kinds:
        return False
    recorded = True
    try:
        if not _record(loop, alert):
            return False
    except _DATABASE_ERRORS as error:  # it may be what the alert is about
        recorded = False
        _log.warning("alert could not be recorded, so it may be sent twice: %s", error_line(error))
    _log.info("%s: %s", alert.title, first_line(alert.text))
    deliveries = deliver(loop, alert)
    for receiver, problem in deliveries.items():
        if problem:
            command = with_loop("finetune alerts --test", loop)
            _log.warning("alert %r was not sent to %s: %s. Try it with `%s`", alert.title, receiver, problem, command)
    if recorded:
        try:
            with connect().write() as connection:
                here = (alerts.c.loop == loop.name, alerts.c.key == alert.key[:_MAX_KEY])
                connection.execute(sa.update(alerts).where(*here).values(deliveries=deliveries))
        except _DATABASE_ERRORS as error:
            _log.warning("alert %r: who got it could not be recorded: %s", alert.title, error_line(error))
    return True


def _record(loop: LoopSettings, alert: Alert) -> bool:
    """Insert an alert; return False if there is one with its key, whose process sends it."""
    row = {
        "loop": loop.name,
        "key": alert.key[:_MAX_KEY],
        "kind": alert.kind,
        "title": alert.title,
        "text": alert.text,
        "link": alert.link,
        "created_at": datetime.now(UTC),
    }
    with connect().write() as connection:
        statement = insert(connection, alerts).values(row).on_conflict_do_nothing()
        return bool(connection.execute(statement).rowcount)


def deliver(loop: LoopSettings, alert: Alert) -> dict[str, str]:
    """Send an alert to the webhook and Slack, if the settings name them, at the same time.

    Returns:
        Receiver -> why it did not get the alert; empty if it did.
    """
    settings, payloads = loop.alerts, {"webhook": _webhook_payload(loop, alert), "slack": _slack_payload(alert)}
    deliveries = {receiver: _late(settings.timeout_seconds) for receiver in receivers(settings)}

    def post(receiver: str, variable: str) -> None:
        deliveries[receiver] = _post(variable, payloads[receiver], settings.timeout_seconds)

    # Threads that nobody has to wait for: looking up a host name has no timeout, and a server can answer drop by drop.
    threads = [
        threading.Thread(target=post, args=named, daemon=True, name=f"alert to {named[0]}")
        for named in receivers(settings).items()
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + settings.timeout_seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(deliveries)


def receivers(settings: AlertSettings) -> dict[str, str]:
    """Return the receivers that the settings name: receiver -> environment variable with its URL."""
    named = {"webhook": settings.webhook_env, "slack": settings.slack_env}
    return {receiver: variable for receiver, variable in named.items() if variable}


def list_alerts(database: Database, loop: str, limit: int = 20) -> Sequence[SentAlert]:
    """Return the newest alerts of a loop, the newest first."""
    statement = sa.select(alerts).where(alerts.c.loop == loop).order_by(alerts.c.created_at.desc()).limit(limit)
    with database.read() as connection:
        return [SentAlert(**row._mapping) for row in connection.execute(statement)]


def _webhook_payload(loop: LoopSettings, alert: Alert) -> dict[str, Any]:
    return {
        "loop": loop.name,
        "kind": alert.kind,
        "key": alert.key,
        "title": alert.title,
        "text": alert.text,
        "link": alert.link,
        "host": socket.gethostname(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _slack_payload(alert: Alert) -> dict[str, Any]:
    lines = [f"*{_escaped(alert.title)}*", _escaped(alert.text[:_MAX_TEXT])]
    if alert.link:
        lines.append(_escaped(alert.link if alert.link.startswith("http") else f"{socket.gethostname()}:{alert.link}"))
    return {"text": "\n".join(lines)}


def _escaped(text: str) -> str:
    """Escape the characters that Slack's markup reserves."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: following it would turn the POST into a GET, whose success means nothing."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(variable: str, payload: Mapping[str, Any], timeout: float) -> str:
    """Send JSON to the URL in an environment variable; return what went wrong, without the URL, which is a secret.

    httpx is not used, because it logs the URL of every request.
    """
    url = os.environ.get(variable, "").strip()
    if not url:
        return f"the environment variable {variable} is not set; export the URL in it"
    if not url.startswith(("http://", "https://")):
        return f"the value of {variable} is not a URL with http:// or https://; correct it"
    headers = {"Content-Type": "application/json", "User-Agent": "finetune-pipeline"}
    try:
        request = urllib.request.Request(url, json.dumps(payload).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"it answered {error.code} {error.reason}; check the URL in {variable}"
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError; ValueError's messages quote the URL
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            return _late(timeout)
        reason = getattr(cause, "strerror", None) or type(cause).__name__
        return f"it cannot be reached ({reason}); check that it runs, and the URL in {variable}"


def _late(seconds: float) -> str:
    return f"no answer within {seconds:g} s; check that it runs and can be reached"
