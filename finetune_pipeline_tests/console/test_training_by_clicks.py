"""Trainings in the console over a real Dagster, by clicks only: from an uploaded file to a promoted model, and back.

The tests share one home and one Dagster, and run in order: the first one begins with an empty home, as a new user does.
"""

import json

import pytest
import yaml

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.search import InteractionFilter, search
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.deployment_history import list_history
from finetune_pipeline.registry.training_jobs import list_jobs
from finetune_pipeline.settings import COMPONENT_TYPE, load_loop, project_path
from finetune_pipeline_tests.console.conftest import OpenConsole, start_console
from finetune_pipeline_tests.pipeline.test_jobs import Server
from finetune_pipeline_tests.waiting import wait_until

pytestmark = [pytest.mark.ui, pytest.mark.timeout(1800)]

LOOP = "site"
QUESTIONS = 56
LONG = 900_000
"""Milliseconds for what a training has to reach."""


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    return tmp_path_factory.mktemp("clicks")


@pytest.fixture(scope="module")
def loops(folder):
    """Declare the default loop with fewer questions, those in the wording of the logs."""
    default = load_loop("aec_parser")
    lines = project_path(default.evaluation.benchmark).read_text(encoding="utf-8").split("\n")
    own_wording = [line for line in lines if line and json.loads(line)["wording"] != "plain"]
    benchmark = folder / "benchmark.jsonl"
    benchmark.write_text("\n".join(own_wording[:: len(own_wording) // QUESTIONS][:QUESTIONS]), encoding="utf-8")
    attributes = default.model_dump(mode="json", exclude_unset=True)
    attributes |= {"name": LOOP, "key_prefix": LOOP, "ingest": {}, "serving": {}}
    attributes["evaluation"] |= {"benchmark": str(benchmark)}
    for section, name in (
        ("", "base_model"),
        ("", "output_schema"),
        ("curation", "replay"),
        ("evaluation", "compliance"),
    ):
        where = attributes[section] if section else attributes
        where[name] = str(project_path(where[name]))
    (folder / "defs" / LOOP).mkdir(parents=True)
    document = yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": attributes})
    (folder / "defs" / LOOP / "defs.yaml").write_text(document, encoding="utf-8")
    return folder / "defs"


@pytest.fixture(autouse=True)
def own_home(folder, loops, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(folder / "home"))
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(loops))
    for name in ("DAGSTER_HOME", "FINETUNE_DATABASE_URL", "FINETUNE_DAGSTER_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder / "home"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return what users liked or corrected in the sample logs, as a file for an upload has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(tmp_path_factory.mktemp("logs")))
        loop = load_loop("aec_parser")
        ingest(loop, connect(), print)
        with connect().read() as connection:
            found = search(connection, loop.name, InteractionFilter(reward=(0.3, 1.0)), 400)
        connect().engine.dispose()
    return [
        {"messages": [{"role": "user", "content": one.interaction.prompt},
                      {"role": "assistant", "content": one.example.target}]}
        for one in found
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dagster(folder, loops):
    (folder / "home").mkdir()
    server = Server(folder, job=f"{LOOP}_loop")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(folder, loops, dagster):
    process, url = start_console(folder / "home", FINETUNE_LOOPS_DIR=str(loops))
    yield url
    process.terminate()
    process.wait(20)
    log = (folder / "home" / "console.log").read_text()
    assert "Traceback" not in log, log


@pytest.fixture
def console(address, browser):
    opened = OpenConsole(browser, address)
    yield opened
    opened.close()
    assert opened.problems == []


def the_job():
    return list_jobs(connect(), LOOP, limit=1)[0]


def test_uploaded_data_becomes_a_promoted_model(console, address, browser, rows, tmp_path):
    assert "No interaction is stored yet" in console.text
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console.open("Data")
    console.page.get_by_role("tab", name="Upload").click()
    console.page.locator("input[type=file]").set_input_files(file)
    console.page.get_by_text("lines can be used").wait_for()
    console.wait()
    console.click("Build a dataset")
    console.page.get_by_text("to train on").first.wait_for(timeout=LONG)

    console.open("Training")
    console.choose("Dataset", 1)  # after "build one from the logs"
    console.page.get_by_role("button", name="Start", exact=True).click()
    console.page.get_by_test_id("stMarkdown").filter(has_text="by ").first.wait_for(timeout=LONG)
    console.close()  # a closed browser changes nothing
    assert the_job().status in {"pending", "running"}

    again = OpenConsole(browser, address)
    again.open("Training")
    again.page.get_by_text("completed", exact=True).first.wait_for(timeout=LONG)
    job = the_job()
    assert (job.status, job.origin, job.error) == ("completed", "console", ""), job.error
    again.page.get_by_text("loss by step").wait_for()
    assert champion(connect(), LOOP) is None

    again.open("Models")
    again.click("Promote")
    again.page.get_by_text(f"{LOOP}@v1.0.0 serves").wait_for(timeout=LONG)
    serving = champion(connect(), LOOP)
    assert serving.sha256 == job.model_sha256 and serving.scores["accuracy"] > 0.5
    again.open("Overview")
    assert "v1.0.0" in again.text

    again.open("Models")
    again.fill("Reason", "to see the way back")
    again.click("Roll back")
    again.page.get_by_text(f"{LOOP}@base serves").wait_for()
    assert champion(connect(), LOOP) is None
    assert [row.action for row in list_history(connect(), LOOP)] == ["promote", "rollback"]
    again.close()
    assert again.problems == []


def test_a_training_is_watched_and_canceled(console, dagster):
    console.open("Training")
    console.page.get_by_text("Start a training").click()
    console.choose("Dataset", 1)
    console.page.get_by_text("All other settings of training").click()
    console.page.get_by_role("textbox", name="logging_steps", exact=True).wait_for()
    console.wait()
    console.fill("num_train_epochs", "60")
    console.fill("logging_steps", "2")
    console.page.get_by_role("button", name="Start", exact=True).click()
    progress = console.page.get_by_test_id("stProgress")
    progress.filter(has_text=" left").wait_for(timeout=LONG)
    step = progress.inner_text()
    for figure in ("Memory", "Machine", "Validation loss"):
        console.page.get_by_test_id("stMetric").filter(has_text=figure).first.wait_for()
    wait_until(lambda: progress.inner_text() != step)  # it goes on by itself
    console.click("Cancel")
    console.page.get_by_text("canceled", exact=True).first.wait_for(timeout=LONG)
    assert the_job().status == "canceled"
    wait_until(lambda: dagster.trainings() == [], 60)
    assert console.page.get_by_role("button", name="Resume").count() == 0
