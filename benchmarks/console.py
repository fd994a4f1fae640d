"""First load and navigation of the console with 100,000 interactions and 50 versions, beside an empty page.

Both run in processes of their own and are opened in Chromium in turn. A page is there when its heading is shown and its
script has ended. Before the first measurement each server has shown its pages, so that its modules are loaded. Before
navigation to a page is measured, the browser has shown it once, so that Streamlit's own scripts of tables and charts
are loaded.
"""

import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import end, publish
from benchmarks.store import history

LOOP = "aec_parser"
INTERACTIONS, VERSIONS, TIMES = 100_000, 50, 7
FIRST_LOAD, NAVIGATION = 1.5, 2.0
PAGES = (
    "Overview", "Try and rate", "Review", "Interactions", "Data", "Training", "Compare", "Models", "Settings",
)  # fmt: skip
_SHOWN = """title => document.querySelector('h1')?.innerText.trim() == title
  && document.querySelector('[data-testid=stApp]')?.dataset.testScriptState == 'notRunning'"""


def main() -> None:
    """Fill a home, and measure both in the same run."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        os.environ["FINETUNE_HOME"] = folder
        os.environ.pop("FINETUNE_DATABASE_URL", None)
        fill()
        loads, pages = _measure(Path(folder))
    empty_load, empty_page = statistics.median(loads["empty"]), statistics.median(pages.pop("empty"))
    load = statistics.median(loads["console"])
    rows = [["first load", f"{load:.2f} s", f"{empty_load:.2f} s", f"{load / empty_load:.2f}", f"{FIRST_LOAD}"]]
    missed = [f"first load is {load / empty_load:.2f} times"] if load > FIRST_LOAD * empty_load else []
    metrics: dict[str, Any] = {"loads": loads, "navigation_empty": empty_page, "navigation": {}}
    for title, seconds in pages.items():
        taken = statistics.median(seconds)
        metrics["navigation"][title] = taken
        ratio = taken / empty_page
        rows.append([f"to {title}", f"{taken:.2f} s", f"{empty_page:.2f} s", f"{ratio:.2f}", f"{NAVIGATION}"])
        missed += [f"to {title} is {ratio:.2f} times"] if ratio > NAVIGATION else []
    publish("console", ["", "console", "empty page", "ratio", "at most"], rows, metrics)
    end(missed)


def fill() -> None:
    """Record interactions, a third of them with feedback, and promote versions."""
    from finetune_pipeline.artifacts import hash_file
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback import FeedbackClient
    from finetune_pipeline.registry.champion import champion, promote
    from finetune_pipeline.registry.model_versions import CandidateModel
    from finetune_pipeline.settings import home

    FeedbackClient(LOOP).log_many(history(0, INTERACTIONS))
    database = connect()
    for number in range(VERSIONS):
        file = home() / f"version-{number}.gguf"
        file.write_bytes(bytes([number]) * 1_000)
        candidate = CandidateModel(
            loop=LOOP, gguf_path=file, gguf_sha256=hash_file(file), base_hash="benchmark", mode="full", lineage={},
            scores={"accuracy": 0.5 + number / 200}, report_path=file,
        )  # fmt: skip
        before = champion(database, LOOP)
        promote(database, candidate, before.id if before else None, "benchmark", "benchmark", None, "force")


def _measure(folder: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of each first load, and of each navigation by the page that it leads to."""
    from playwright.sync_api import sync_playwright

    from finetune_pipeline_tests.console.conftest import CHROMIUM, start_console, start_empty_page

    if CHROMIUM is None:
        sys.exit("Chromium is not installed; Debian: apt-get install chromium")
    (folder / "empty").mkdir()
    servers = [("console", *start_console(folder)), ("empty", *start_empty_page(folder / "empty"))]
    loads: dict[str, list[float]] = {name: [] for name, _, _ in servers}
    pages: dict[str, list[float]] = {title: [] for title in ("empty", *PAGES)}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for number in range(TIMES + 1):
                for name, _, url in servers:
                    context = browser.new_context(viewport={"width": 1280, "height": 800})
                    page = context.new_page()
                    page.set_default_timeout(300_000)
                    own = number > 0  # the first ones warm up
                    title = "Overview" if name == "console" else "Empty"
                    started = time.perf_counter()
                    page.goto(url)
                    page.wait_for_function(_SHOWN, arg=title)
                    if own:
                        loads[name].append(time.perf_counter() - started)
                    titles = [*PAGES[1:], PAGES[0]] if name == "console" else ["Other", "Empty"] * 2
                    for index, title in enumerate(titles * 2):
                        link = page.get_by_test_id("stSidebarNav").get_by_role("link", name=title, exact=True)
                        started = time.perf_counter()
                        link.click()
                        page.wait_for_function(_SHOWN, arg=title)
                        if own and index >= len(titles):
                            pages[title if name == "console" else "empty"].append(time.perf_counter() - started)
                    context.close()
                print(f"{datetime.now(UTC):%H:%M:%S} round {number} of {TIMES}", file=sys.stderr)
            browser.close()
    finally:
        for _, process, _ in servers:
            process.terminate()
            process.wait(20)
    return loads, pages


if __name__ == "__main__":
    main()
