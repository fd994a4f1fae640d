"""The console in a real browser: each page's main act, on the sample logs of the default loop."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.database.audit import list_audit
from finetune_pipeline.export import base_gguf as base_gguf_module
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.export.gguf import convert, quantize
from finetune_pipeline.feedback.search import InteractionFilter, search
from finetune_pipeline.feedback.store import counters
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.model_versions import list_models
from finetune_pipeline.registry.requested_comparisons import list_requested_comparisons, pairs_of, votes_of
from finetune_pipeline.settings import COMPONENT_TYPE, load_loop
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.console.conftest import OpenConsole, start_console
from finetune_pipeline_tests.serving.conftest import STARTER, copying, promote

pytestmark = pytest.mark.ui

LOOP = "aec_parser"
PAGES = ("Overview", "Try and rate", "Review", "Interactions", "Data", "Training", "Compare", "Models", "Settings")
PROMPT = "150 mm concrete wall fire-rated two hours"
SHOTS = os.environ.get("FINETUNE_UI_SCREENSHOTS")


@pytest.fixture(scope="module")
def prepared(browser, tmp_path_factory):
    """A home with the sample logs, and two promoted versions of the default loop and of `small`."""
    home = tmp_path_factory.mktemp("console") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(home))
        for name in ("DAGSTER_HOME", "FINETUNE_DATABASE_URL", "FINETUNE_LOOPS_DIR"):
            patch.delenv(name, raising=False)
        loop = load_loop(LOOP)
        ingest(loop, connect(), print)
        files = {kind: home / f"{kind}.gguf" for kind in ("F16", "Q8_0", "Q4_K_M")}
        convert(STARTER, files["F16"])
        for kind in ("Q8_0", "Q4_K_M"):
            quantize(files["F16"], files[kind], kind)
        patch.setattr(base_gguf_module, "export", copying(files))
        for name in (LOOP, "small"):
            base_gguf(loop.model_copy(update={"name": name}), print)
            promote(files["F16"], name)
            promote(files["Q8_0"], name)
        connect().engine.dispose()
    return home


@pytest.fixture(scope="module")
def shared(prepared):
    """The address of a console for tests that change nothing."""
    process, url = start_console(prepared)
    yield url
    process.terminate()
    process.wait(20)
    assert "Traceback" not in (prepared / "console.log").read_text()


@pytest.fixture
def reader(shared, browser):
    opened = OpenConsole(browser, shared)
    yield opened
    opened.close()
    assert opened.problems == []


@pytest.fixture
def home(prepared, tmp_path, monkeypatch):
    """A copy of the prepared home for one test."""
    copy = tmp_path / "console-home"
    shutil.copytree(prepared, copy)
    monkeypatch.setenv("FINETUNE_HOME", str(copy))
    return copy


@pytest.fixture
def console(home, browser):
    process, url = start_console(home)
    opened = OpenConsole(browser, url)
    yield opened
    opened.close()
    process.terminate()
    assert process.wait(20) is not None
    log = (home / "console.log").read_text()
    assert "Traceback" not in log, log
    assert opened.problems == []


def audit():
    return [(row.action, row.outcome) for row in reversed(list_audit(connect(), LOOP, 50))]


def newest(**wanted):
    with connect().read() as connection:
        return search(connection, LOOP, InteractionFilter(**wanted), 1)[0]


def test_the_overview_says_what_serves_and_what_to_do(reader):
    reader.page.get_by_test_id("stMetric").first.wait_for()
    text = reader.text
    assert "v1.1.0" in text or "v1.0.1" in text
    assert "high-reward examples, 50 needed" in text
    assert "There are enough new examples: start a training on the page Training." in text
    assert "to review (optional)" in text
    assert "Start it with finetune ui" in text  # Dagster does not run


def test_an_answer_is_tried_rated_and_corrected(console):
    console.open("Try and rate")
    console.click("Ask")
    assert "The prompt is empty." in console.text
    console.fill("Prompt", PROMPT)
    console.click("Ask")
    console.page.get_by_role("button", name="Good").wait_for()
    found = newest(text=PROMPT)
    assert (found.interaction.user, found.interaction.variant) == (audit_actor(), "ask")
    console.click("Good")
    console.click("Gold star")
    console.page.get_by_text("Correct the answer").click()
    console.fill("The correct answer", '{"element": 3}')
    console.click("Save the correction")
    assert "does not accept it" in console.text
    console.fill("The correct answer", '{"element":"wall","material":"concrete","thickness_mm":150,"fire_rating_hr":2}')
    console.click("Save the correction")
    kinds = [feedback.kind for feedback in newest(text=PROMPT).feedback]
    assert kinds == ["thumbs_up", "rating", "correction"]
    assert [action for action, _ in audit()] == ["ask", "feedback thumbs_up", "feedback gold", "feedback correction"]
    assert {outcome for _, outcome in audit()} == {""}


def audit_actor():
    return list_audit(connect(), LOOP, 1)[0].actor


def test_an_approved_example_is_in_the_next_dataset(console):
    console.fill("Your name", "rita")
    console.open("Review")
    console.press("s")
    console.press("u")
    while "It cannot train as it is" in console.text:
        console.press("x")
    with connect().read() as connection:
        before = counters(connection, LOOP)
    console.press("a")
    decided = list_audit(connect(), LOOP, 1)[0]
    assert (decided.action, decided.actor, decided.outcome) == ("review approve", "rita", "")
    console.press("e")
    console.fill("Correct answer", "not JSON")
    console.click("Save")
    assert "It cannot train like this" in console.text
    console.click("Cancel")
    loop = load_loop(LOOP)
    raw_logs, _ = snapshot(loop, connect())
    dataset = build_dataset(loop, raw_logs)
    rows = [*dataset_rows(dataset.path, "train"), *dataset_rows(dataset.path, "validation")]
    assert decided.subject in {row["interaction_id"] for row in rows}
    assert before["interactions"] == 320


def test_interactions_are_searched_and_opened(console):
    console.open("Interactions")
    assert "1 to 25" in console.text
    console.fill("Text", "no such text anywhere")
    assert "No interaction matches." in console.text
    console.fill("Text", "duct")
    console.select_row(0)
    assert "what it trains" in console.text and "answer of aec_parser@" in console.text
    console.click("Bad")
    assert audit() == [("feedback thumbs_down", "")]


def test_a_model_is_switched_archived_and_rolled_back(console):
    db = connect()
    console.open("Models")
    first, second = sorted(one.name for one in list_models(db, LOOP))
    assert champion(db, LOOP).name == second
    console.click("Roll back")
    assert "Rollback needs reason" in console.text  # nothing happened
    assert champion(db, LOOP).name == second
    console.fill("Reason", "to see it")
    console.click("Roll back")
    assert champion(db, LOOP).name == first
    console.wait()
    console.fill("Reason", "better after all")
    console.click("Switch to the base model")
    assert champion(db, LOOP) is None
    console.wait()
    console.fill("Reason", "not needed for now")
    console.click("Archive")
    assert [one.name for one in list_models(db, LOOP) if one.archived_at] == [second]
    console.wait()
    console.fill("Reason", "needed after all")
    console.click("Unarchive")
    console.wait()
    console.fill("Reason", "the best one")
    console.click("Make it the champion")
    assert champion(db, LOOP).name == second
    done = ["model rollback", "model rollback", "model switch", "model archive", "model unarchive", "model switch"]
    assert [action for action, _ in audit()] == done
    assert [outcome == "" for _, outcome in audit()] == [False, *[True] * 5]


def test_a_training_that_cannot_start_says_why(console):
    console.open("Training")
    assert "No training was started yet." in console.text
    console.fill("learning_rate", "fast")
    console.page.get_by_role("button", name="Start", exact=True).click()
    console.wait()
    assert "training.learning_rate: found 'fast', expected a number." in console.text.lower()
    console.fill("learning_rate", "1e-3")
    console.page.get_by_text("All other settings of training").click()
    console.page.get_by_role("textbox", name="lora_r", exact=True).wait_for()
    console.fill("lora_r", "8")
    console.page.get_by_role("button", name="Start", exact=True).click()
    console.wait()
    assert "Start it with finetune ui" in console.text  # no job was created, since Dagster does not run
    assert [outcome == "" for _, outcome in audit()] == [False, False]


def upload(console, path, *, bad=""):
    """Choose a file of corrected answers on the page Data, with a bad line before them."""
    with connect().read() as connection:
        corrected = search(connection, LOOP, InteractionFilter(label="correction"), 80)
    rows = [
        {"messages": [{"role": "user", "content": one.interaction.prompt},
                      {"role": "assistant", "content": one.example.target}]}
        for one in corrected
    ]  # fmt: skip
    path.write_text("\n".join([*([bad] if bad else []), *map(json.dumps, rows)]))
    console.open("Data")
    assert "No dataset was built yet." in console.text
    console.page.get_by_role("tab", name="Upload").click()
    console.page.locator("input[type=file]").set_input_files(path)
    console.page.get_by_text("80 lines can be used").wait_for()
    console.wait()


def test_a_file_with_a_bad_row_is_refused(console, tmp_path):
    upload(console, tmp_path / "rows.jsonl", bad='{"messages": 5}')
    assert "1 line cannot be used" in console.text
    console.click("Build a dataset")
    assert "line 1: messages" in console.text
    assert [(action, outcome == "") for action, outcome in audit()] == [("dataset upload", False)]


def test_an_uploaded_file_becomes_a_dataset(console, tmp_path):
    upload(console, tmp_path / "rows.jsonl")
    console.click("Build a dataset")
    console.page.get_by_text("to train on").first.wait_for()
    assert audit() == [("dataset upload", "")]


def test_two_models_are_compared_and_voted_on(console, tmp_path):
    console.open("Compare")
    assert "Nothing was compared yet." in console.text
    console.choose("First model", "base")
    console.page.get_by_text("prompts of my own", exact=True).first.click()
    console.click("Compare")
    assert "Found 0 prompts, expected 1 to 200" in console.text
    console.fill("Prompts of my own", f"{PROMPT}\n\n200 mm brick wall\n")
    console.page.get_by_role("button", name="Compare", exact=True).click()
    console.page.get_by_text("Which answer is better?").wait_for()
    console.wait()
    [asked] = list_requested_comparisons(connect(), [LOOP])
    assert (asked.prompts, asked.base, asked.created_by) == (
        [PROMPT, "200 mm brick wall"],
        f"{LOOP}@base",
        audit_actor(),
    )
    assert asked.base not in console.page.get_by_test_id("stMarkdown").last.inner_text()
    console.press("a")
    console.page.get_by_text("Pair 2 of 2").wait_for()
    console.click("Tie")
    console.page.get_by_text("You have voted on every pair.").wait_for()
    first, second = votes_of(connect(), asked.id)
    pair = pairs_of(connect(), asked.id)[0]
    assert (first.voter, first.choice) == (audit_actor(), "tuned" if pair.swapped else "base")
    assert second.choice == "tie"
    winner = asked.tuned if pair.swapped else asked.base
    votes = console.page.get_by_test_id("stMetric").filter(has_text=f"Votes for {winner.rpartition('@')[2]}")
    assert votes.get_by_test_id("stMetricValue").inner_text() == "1"
    assert audit() == [("compare start", ""), ("compare vote", ""), ("compare vote", "")]


def test_a_comparison_on_the_benchmark_has_a_report(home, browser, tmp_path):
    questions = Path(load_loop(LOOP).evaluation.benchmark).read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(questions), encoding="utf-8")
    folder = tmp_path / "loops" / "small"
    folder.mkdir(parents=True)
    evaluation = {"benchmark": str(tmp_path / "few.jsonl"), "metric": "rouge1", "max_tokens": 48, "context": 512}
    attributes = {"name": "small", "base_model": str(STARTER), "evaluation": evaluation}
    document = {"type": COMPONENT_TYPE, "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    process, url = start_console(home, FINETUNE_LOOPS_DIR=str(folder.parent))
    try:
        console = OpenConsole(browser, url)
        console.open("Compare")
        console.page.get_by_role("button", name="Compare", exact=True).click()
        console.page.get_by_text("Blind vote").wait_for(timeout=300_000)
        assert "p-value" in console.text and "Quality" in console.text and "Efficiency" in console.text
        with console.page.expect_download() as download:
            console.click("Download the report")
        assert "<html" in Path(download.value.path()).read_text(encoding="utf-8")
        [asked] = list_requested_comparisons(connect(), ["small"])
        assert asked.tuned_wins + asked.base_wins + asked.ties == len(pairs_of(connect(), asked.id)) == len(questions)
        console.close()
        assert console.problems == []
    finally:
        process.terminate()
        process.wait(20)


def test_settings_are_found(reader):
    reader.open("Settings")
    reader.fill("Find", "learning rate")
    assert "1 of " in reader.text


def test_a_key_that_only_reads_can_change_nothing(home, browser):
    secrets = {scope: create_key(connect(), scope, [scope]) for scope in ("view", "feedback")}
    process, url = start_console(home)
    try:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.get_by_label("API key").fill("ft-wrong")
        page.get_by_role("button", name="Log in").click()
        assert "No key in use" in page.inner_text("main")
        page.get_by_label("API key").fill(secrets["view"])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_selector("h1:has-text('Overview')")
        page.get_by_test_id("stSidebarNav").get_by_role("link", name="Review").click()
        page.get_by_text("log in with one that has feedback").wait_for()
        page.get_by_test_id("stSidebarNav").get_by_role("link", name="Models").click()
        page.wait_for_selector("h1:has-text('Models')")
        page.get_by_text("History").wait_for()
        assert page.get_by_role("button", name="Roll back").count() == 0
        context.close()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_every_page_fits_in_both_themes(shared, browser, theme, width, height):
    console = OpenConsole(browser, shared, width, height, theme)
    for title in PAGES:
        console.open(title)
        page = console.page
        if width < 500 and page.get_by_test_id("stSidebarCollapseButton").is_visible():
            page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
            page.wait_for_timeout(500)
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{title} is {overflow} pixels too wide"
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"{title.lower().replace(' ', '-')}-{theme}-{width}.png")
    console.close()
    assert console.problems == []
