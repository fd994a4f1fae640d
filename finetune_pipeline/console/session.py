"""What all pages share: who uses the console, the loop, and actions with their audit rows."""

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import streamlit as st

from finetune_pipeline.console import read_cache
from finetune_pipeline.console.access import ConsoleUser
from finetune_pipeline.console.guard import COOKIE
from finetune_pipeline.console.known_loops import known_loops
from finetune_pipeline.console.server import current_access
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.database import Database, connect
from finetune_pipeline.database.api_keys import Scope
from finetune_pipeline.database.audit import audited
from finetune_pipeline.orchestrator import Orchestrator, dagster_url
from finetune_pipeline.pipeline.expected_errors import EXPECTED
from finetune_pipeline.settings import LoopSettings, home
from finetune_pipeline.wording import sentence

R = TypeVar("R")

_NEEDED = {"feedback": "rate and review", "admin": "change models, data and trainings"}


def user() -> ConsoleUser:
    """Return who uses the console; ends the page if the login has ended."""
    found = current_access().user(st.context.cookies.get(COOKIE))
    if found is None:
        st.warning("Your login has ended. Load the page again to log in.")
        st.stop()
    assert found is not None  # st.stop does not return
    return found


def actor() -> str:
    """Return the name that is recorded with what the user does.

    It is the key's name. Without keys, the user may give another than that of the operating system's user.
    """
    found = user()
    given = "" if found.by_key else str(st.session_state.get("own_name", ""))
    return given.strip()[:200] or found.name


def may(scope: Scope) -> bool:
    """Return whether the user may do what needs this scope; if not, say so once on the page."""
    found = user()
    if found.may(scope):
        return True
    scopes = ", ".join(sorted(found.scopes))
    st.info(f"The key {found.name!r} has the scopes {scopes}. To {_NEEDED[scope]}, log in with one that has {scope}.")
    return False


def database() -> Database:
    """Return the database."""
    return connect()


def loop() -> LoopSettings:
    """Return the loop that the user chose."""
    return known_loops()[st.session_state["loop"]]


def dagster() -> Orchestrator:
    """Return Dagster behind its webserver; it is asked for at most a few seconds."""
    return Orchestrator(dagster_url(home()), timeout_seconds=5)


def perform(action: str, subject: str, work: Callable[[], R], *, needs: Scope, detail: str = "") -> R | None:
    """Perform an action of the user with a row in the audit log; show an expected error and return None.

    Args:
        action: its name in the audit log, such as model switch.
        subject: what it is about: an id or a name.
        needs: the scope without which it is refused.
        detail: further facts for the log; no text of interactions.
    """
    if not user().may(needs):
        st.error(f"This needs a key with the scope {needs}.")
        return None
    try:
        with audited(database(), loop().name, actor(), action, subject, detail):
            result = work()
    except EXPECTED as error:
        st.error(sentence(str(error)))
        return None
    except ValueError as error:  # of a field that the user filled in
        st.error(sentence(str(error)))
        return None
    read_cache.clear()
    return result


def notify(message: str) -> None:
    """Show a message on the next run of the page, as after an action that changes it."""
    st.session_state["notice"] = message


def show_notice() -> None:
    """Show what `notify` was given."""
    if notice := st.session_state.pop("notice", ""):
        st.toast(notice)


def redacted(text: str) -> str:
    """Return a text without secrets and personal data."""
    return redact(text, loop().curation.redaction).text


def moment(time: datetime | None) -> str:
    """Return a time in UTC for people; a dash for none."""
    return f"{time:%Y-%m-%d %H:%M} UTC" if time else "\u2013"


def percent(value: float | None) -> str:
    """Return a fraction in percent; a dash for none."""
    return f"{value:.1%}" if value is not None else "\u2013"


def cached(function: Callable[..., R], *arguments: Any) -> R:
    """Return the result of a read function for the current loop; see `read_cache`."""
    with st.spinner("Reading"):
        return read_cache.read(function, loop(), database(), *arguments)
