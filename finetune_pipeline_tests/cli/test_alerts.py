"""`finetune alerts`, as people type it."""

import json

import pytest
from click.testing import CliRunner

from finetune_pipeline.alerts import Alert, send
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import read_loop
from finetune_pipeline_tests.orchestration.conftest import make_loop  # noqa: F401
from finetune_pipeline_tests.receiver import receiving

ALERT = Alert("failure", "run 1", "notes: the run failed in second", "no disk\nnext: free some space", "/srv/run.log")


@pytest.fixture
def declared(make_loop, tmp_path, monkeypatch):  # noqa: F811
    """Declare a loop with these receivers, and return its settings."""

    def declare(**alerts):
        make_loop(alerts=alerts)
        monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
        return read_loop(tmp_path / "defs" / "notes" / "defs.yaml")

    return declare


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, ["alerts", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_newest_alerts_are_shown_with_who_got_them(declared, monkeypatch):
    loop = declared(slack_env="SLACK_URL")
    monkeypatch.delenv("SLACK_URL", raising=False)
    assert "loop notes has sent no alerts; alerts are about failure, rejection, promotion" in run()
    send(loop, ALERT)
    time, shown = run().split(" UTC  ")
    assert shown.split("\n") == [
        "failure  notes: the run failed in second",
        "    no disk",
        "    next: free some space",
        "    /srv/run.log",
        "    slack: the environment variable SLACK_URL is not set; export the URL in it",
        "",
    ]
    (row,) = json.loads(run("--json"))
    assert row["created_at"].startswith(time.replace(" ", "T")) and row["key"] == "run 1"


def test_a_test_alert_reaches_the_receivers_and_stays_out_of_the_history(declared, monkeypatch):
    with receiving() as receiver:
        monkeypatch.setenv("SLACK_URL", receiver.url)
        declared(slack_env="SLACK_URL", kinds=[])
        assert run("--test") == "slack: sent\n"
        assert run("--test") == "slack: sent\n"
        assert [body["text"] for body in receiver.got] == ["*notes: this is a test*\nNothing happened."] * 2
        receiver.status = 410
        assert run("--test", code=1) == "slack: it answered 410 Gone; check the URL in SLACK_URL\n"
    assert json.loads(run("--json")) == []


def test_a_test_without_a_receiver_says_which_setting_is_missing(declared):
    declared()
    result = CliRunner().invoke(finetune, ["alerts", "--test"])
    assert "set alerts.webhook_env or alerts.slack_env" in str(result.exception)
