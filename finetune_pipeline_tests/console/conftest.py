"""The console as a process of its own, and a browser that reports every error in its log."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune_pipeline.settings import PROJECT_ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str:
    """Return what is missing for tests in a browser; empty if nothing is."""
    absent = [
        f"the package {name}"
        for name in ("streamlit", "playwright", "axe_playwright_python")
        if find_spec(name) is None
    ]
    absent += [] if CHROMIUM else ["Chromium"]
    return ", ".join(absent)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Start Chromium."""
    if absent := missing():
        pytest.skip(f"{absent} is not installed; `make test-ui` needs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class OpenConsole:
    """A page of the console in a browser.

    Attributes:
        page: Playwright's page.
        problems: errors in the browser's log, failed requests, and requests to other hosts.
    """

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 800, theme: str = "light") -> None:
        self.url = url
        self.problems: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("request", self._note_foreign)
        self.page.goto(url)
        self.wait()

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url', '')})")

    def _note_foreign(self, request: Any) -> None:
        if not request.url.startswith((self.url, self.url.replace("http", "ws"), "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def wait(self) -> None:
        """Wait until the script of the page has run."""
        self.page.wait_for_selector("h1")
        self.page.wait_for_timeout(150)  # a click is on its way to the server
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")
        self.page.wait_for_timeout(150)

    def open(self, title: str) -> None:
        """Open a page by its link."""
        if self.page.get_by_test_id("stExpandSidebarButton").is_visible():
            self.page.get_by_test_id("stExpandSidebarButton").click()
            self.page.wait_for_timeout(500)  # it slides in
        self.page.get_by_test_id("stSidebarNav").get_by_role("link", name=title, exact=True).click()
        self.page.wait_for_selector(f"h1:has-text('{title}')")
        self.wait()

    def click(self, name: str) -> None:
        """Click a button and wait for what it does."""
        self.page.get_by_test_id("stMain").get_by_role("button", name=name, exact=False).first.click()
        self.wait()

    def fill(self, label: str, text: str) -> None:
        """Write into a field and leave it, and wait for what that does."""
        field = self.page.get_by_role("textbox", name=label, exact=True)
        field.fill(text)
        field.press("Tab")
        self.wait()

    def choose(self, label: str, option: str | int) -> None:
        """Choose an option of a list, by its text or its number from 0."""
        field = self.page.get_by_role("combobox", name=re.compile(rf"{re.escape(label)}$"))
        field.first.click()
        options = self.page.get_by_role("option")
        (options.nth(option) if isinstance(option, int) else options.get_by_text(option, exact=True)).click()
        self.wait()

    def select_row(self, number: int) -> None:
        """Select a row of the first table that has check boxes; the first one is 0."""
        box = self.page.get_by_test_id("stDataFrame").first.bounding_box()
        self.page.mouse.click(box["x"] + 17, box["y"] + 53 + 35 * number)
        self.wait()

    def press(self, key: str) -> None:
        """Press a key outside of all fields, and wait for what it does."""
        self.page.locator("h1").click()
        self.page.keyboard.press(key)
        self.wait()

    @property
    def text(self) -> str:
        """The text of the page."""
        return str(self.page.get_by_test_id("stMain").inner_text())

    def close(self) -> None:
        """Close the page."""
        self.context.close()


EMPTY_SERVER = """
import sys
import streamlit as st
from finetune_pipeline.console.server import options
st.App(sys.argv[1]).run(config=options("127.0.0.1", int(sys.argv[2])))
"""
"""Serves pages of Streamlit with the console's options."""

EMPTY_PAGES = """
import streamlit as st
def first(): st.title("Empty")
def second(): st.title("Other")
st.navigation([st.Page(first, title="Empty", default=True), st.Page(second, title="Other")]).run()
"""
"""Two pages with nothing on them, to compare the console's pages with."""


def start_console(home: Path, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start `finetune console` for a home; return the process and its address."""
    return _start(["-m", "finetune_pipeline.cli.main", "console", "--port"], home, **environment)


def start_empty_page(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start Streamlit with two empty pages; return the process and its address."""
    (folder / "empty.py").write_text(EMPTY_PAGES)
    return _start(["-c", EMPTY_SERVER, str(folder / "empty.py")], folder)


def _start(arguments: list[str], home: Path, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "FINETUNE_HOME": str(home), "PYTHONPATH": str(PROJECT_ROOT), **environment}
    with (home / "console.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *arguments, str(port)], env=env, stdout=log, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/_stcore/health", timeout=5)
            return process, url
        except httpx.HTTPError:
            assert process.poll() is None, (home / "console.log").read_text()
            time.sleep(0.2)
    process.kill()
    raise AssertionError("the console did not start within three minutes")
