"""`finetune console` as a server: Streamlit's ASGI application behind the guard."""

import gc
import importlib
import logging
import threading
from contextlib import suppress
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from finetune_pipeline.console import read_cache
from finetune_pipeline.console.access import ConsoleAccess
from finetune_pipeline.console.comparer import Comparer
from finetune_pipeline.console.known_loops import known_loops
from finetune_pipeline.database import Database
from finetune_pipeline.settings import SettingsError

MAX_UPLOAD_MB = 200
"""Largest uploaded file."""

INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[console]'"

_LIGHT = {
    "primaryColor": "#2f6690",
    "backgroundColor": "#ffffff",
    "secondaryBackgroundColor": "#f4f6f8",
    "textColor": "#1f2933",
    "linkColor": "#2f6690",
    "borderColor": "#d9dfe5",
}
_DARK = {
    "primaryColor": "#4f93c4",
    "backgroundColor": "#14171c",
    "secondaryBackgroundColor": "#1d2127",
    "textColor": "#e4e7eb",
    "linkColor": "#8dbfe3",
    "borderColor": "#363d46",
}
_SIDEBAR = {"light": "#f4f6f8", "dark": "#191d22"}

_access: ConsoleAccess | None = None


def current_access() -> ConsoleAccess:
    """Return the access rules of the console that this process serves."""
    if _access is None:
        raise RuntimeError("the console is not served; start it with `finetune console`")
    return _access


def options(host: str, port: int) -> dict[str, Any]:
    """Return Streamlit's options: the theme, no telemetry, limits."""
    themes = {
        f"theme.{name}.{option}": value
        for name, colors in (("light", _LIGHT), ("dark", _DARK))
        for option, value in colors.items()
    }
    sidebars = {f"theme.{name}.sidebar.backgroundColor": color for name, color in _SIDEBAR.items()}
    return {
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        "client.disableDataExport": True,  # only what the pages offer is exported
        "global.developmentMode": False,
        "logger.hideWelcomeMessage": True,
        "logger.level": "warning",
        "server.address": host,
        "server.enableStaticServing": False,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": MAX_UPLOAD_MB,
        "server.port": port,
        "theme.baseRadius": "0.4rem",
        "theme.headingFontSizes": ["1.7rem", "1.3rem", "1.1rem", "1rem", "1rem", "1rem"],
        "theme.metricValueFontSize": "1.5rem",
        "theme.showWidgetBorder": True,
        **themes,
        **sidebars,
    }


def serve(database: Database, host: str, port: int, *, loopback: bool) -> None:
    """Serve the console until SIGINT or SIGTERM.

    Args:
        loopback: the address can be reached only from this machine.

    Raises:
        SettingsError: Streamlit is not installed, or no key exists for an address that others can reach.
    """
    global _access
    try:
        import streamlit as st
        from starlette.middleware import Middleware
    except ImportError as error:
        raise SettingsError(f"the console needs the extra `console` ({error}); install it: {INSTALL}") from error
    from finetune_pipeline.console.guard import ConsoleGuard

    _access = ConsoleAccess(database, loopback=loopback)
    if not loopback and not _access.has_keys:
        raise SettingsError(
            f"{host} can be reached from other machines, and no API key may log in. Create one with "
            "`finetune key create NAME --scope admin`, or serve 127.0.0.1."
        )
    app = st.App(
        Path(__file__).with_name("app.py"),
        middleware=[Middleware(ConsoleGuard, _access)],
        on_script_error=_report,
    )
    threading.Thread(target=_read_ahead, args=(database,), name="console-read", daemon=True).start()
    comparer = Comparer(database)
    comparer.start()
    try:
        app.run(config=options(host, port))
    finally:
        comparer.stop()


def _read_ahead(database: Database) -> None:
    """Load and read what the first page shows, so that the first visit does not wait for it."""
    from finetune_pipeline.pipeline.expected_errors import EXPECTED
    from finetune_pipeline.pipeline.overview import loop_figures
    from finetune_pipeline.pipeline.status import loop_status

    views = [f"{__package__}.views.{one.name}" for one in iter_modules([str(Path(__file__).with_name("views"))])]
    for name in ("altair", "pandas", "pyarrow", *views):
        importlib.import_module(name)
    with suppress(*EXPECTED):  # the page shows it
        loop = next(iter(known_loops().values()), None)
        for function in (loop_figures, loop_status):
            if loop is not None:
                read_cache.read(function, loop, database)
    # Streamlit collects garbage after each run of a page. What was loaded by now never becomes garbage, and looking
    # through it takes longer than the page.
    gc.collect()
    gc.freeze()


def _report(error: Exception) -> bool:
    """Tell the user in a sentence what went wrong; log a bug of a page with its traceback."""
    import streamlit as st

    from finetune_pipeline.pipeline.expected_errors import EXPECTED
    from finetune_pipeline.wording import sentence

    if isinstance(error, EXPECTED):
        st.error(sentence(str(error)))
        return True
    logging.getLogger(__name__).error("a page failed", exc_info=error)
    st.error(f"This page failed ({type(error).__name__}). The console's log has the details.")
    return True
