"""Alerts over real HTTP: what receivers get, once, and what happens if one is down, slow or refuses."""

import logging
import socket
import threading
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from finetune_pipeline.alerts import Alert, list_alerts, send
from finetune_pipeline.database import connect
from finetune_pipeline.settings import AlertSettings
from finetune_pipeline_tests.receiver import receiving

ALERT = Alert(
    kind="rejection",
    key="run 1",
    title="notes: the challenger was evaluated and not promoted",
    text="gain 2.0%, 5% needed\nnext: see <the report> & log more feedback",
    link="/srv/report.html",
)


def loop_with(**alerts):
    return SimpleNamespace(name="notes", alerts=AlertSettings(**alerts))


@pytest.fixture
def slack(monkeypatch):
    """Return settings that name a variable for Slack, which gets the URL of a receiver."""

    def made(url, **alerts):
        monkeypatch.setenv("SLACK_URL", url)
        return loop_with(slack_env="SLACK_URL", **alerts)

    return made


def deliveries():
    return [alert.deliveries for alert in list_alerts(connect(), "notes")]


def test_the_default_is_the_log_and_the_history(caplog):
    with caplog.at_level(logging.INFO, "finetune_pipeline.alerts"):
        assert send(loop_with(), ALERT)
    assert caplog.messages == ["notes: the challenger was evaluated and not promoted: gain 2.0%, 5% needed"]
    (found,) = list_alerts(connect(), "notes")
    assert (found.kind, found.title, found.text, found.link) == (ALERT.kind, ALERT.title, ALERT.text, ALERT.link)
    assert found.deliveries == {}


def test_webhook_and_slack_get_the_alert_in_their_own_form(monkeypatch):
    with receiving() as webhook, receiving() as slack:
        monkeypatch.setenv("HOOK_URL", webhook.url)
        monkeypatch.setenv("SLACK_URL", slack.url)
        assert send(loop_with(webhook_env="HOOK_URL", slack_env="SLACK_URL"), ALERT)
    (body,) = webhook.got
    assert body.pop("time").endswith("+00:00")
    assert body == {
        "loop": "notes", "kind": "rejection", "key": "run 1", "title": ALERT.title, "text": ALERT.text,
        "link": "/srv/report.html", "host": socket.gethostname(),
    }  # fmt: skip
    escaped = "gain 2.0%, 5% needed\nnext: see &lt;the report&gt; &amp; log more feedback"
    assert slack.got == [{"text": f"*{ALERT.title}*\n{escaped}\n{socket.gethostname()}:/srv/report.html"}]
    assert deliveries() == [{"webhook": "", "slack": ""}]


def test_an_alert_is_sent_once_whoever_sends_it(slack):
    with receiving() as receiver:
        loop = slack(receiver.url)
        sent = []
        threads = [threading.Thread(target=lambda: sent.append(send(loop, ALERT))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(sent) == [False] * 7 + [True]
        other = SimpleNamespace(name="mails", alerts=loop.alerts)
        assert send(other, ALERT)  # keys are of a loop
    assert len(receiver.got) == 2


def test_kinds_select_and_an_alert_that_is_left_out_is_not_recorded(slack):
    with receiving() as receiver:
        assert not send(slack(receiver.url, kinds=["failure", "promotion"]), ALERT)
    assert receiver.got == [] and deliveries() == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"status": 500}, "it answered 500 Internal Server Error; check the URL in SLACK_URL"),
        ({"status": 404}, "it answered 404 Not Found; check the URL in SLACK_URL"),
        (
            {"status": 302, "headers": {"Location": "/elsewhere"}},
            "it answered 302 Found; check the URL in SLACK_URL",
        ),
        ({"hang": "silent"}, "no answer within 0.5 s; check that it runs and can be reached"),
        ({"hang": "drip"}, "no answer within 0.5 s; check that it runs and can be reached"),
    ],
)
def test_a_receiver_that_refuses_or_is_slow_is_logged_with_what_to_do(slack, caplog, options, problem):
    with receiving(**options) as receiver, caplog.at_level(logging.DEBUG):
        assert send(slack(receiver.url, timeout_seconds=0.5), ALERT)  # returns, though the receiver still hangs
        assert not receiver.ended.is_set()
    assert receiver.paths == ["/services/T0/B0/topsecret"]
    assert deliveries() == [{"slack": problem}]
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert problem in warning and "`finetune alerts --test --loop notes`" in warning
    assert "topsecret" not in caplog.text


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "the environment variable SLACK_URL is not set; export the URL in it"),
        ("hooks.slack.com/topsecret", "the value of SLACK_URL is not a URL with http:// or https://; correct it"),
        ("file:///etc/topsecret", "the value of SLACK_URL is not a URL with http:// or https://; correct it"),
        ("http://127.0.0.1:port/topsecret", "it cannot be reached (InvalidURL); check that it runs, and the URL in"),
        ("http://[topsecret", "it cannot be reached (ValueError); check that it runs, and the URL in SLACK_URL"),
        ("http://127.0.0.1/a b\ntopsecret", "it cannot be reached (InvalidURL); check that it runs, and the URL in"),
        ("http://nowhere.invalid/topsecret", "it cannot be reached ("),
    ],
)
def test_a_wrong_url_is_named_by_its_variable_only(slack, caplog, url, problem):
    with caplog.at_level(logging.DEBUG):
        assert send(slack(url), ALERT)
    (found,) = deliveries()
    assert found["slack"].startswith(problem)
    assert "topsecret" not in caplog.text + str(found)


def test_a_receiver_that_is_down_is_logged(slack):
    with receiving() as receiver:
        url = receiver.url
    assert send(slack(url), ALERT)
    assert deliveries() == [
        {"slack": "it cannot be reached (Connection refused); check that it runs, and the URL in SLACK_URL"}
    ]


def test_a_database_that_cannot_be_opened_does_not_keep_an_alert_back(slack, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_DATABASE_URL", f"sqlite:///{tmp_path}/file/finetune.db")
    with receiving() as receiver:
        assert send(slack(receiver.url), ALERT)
    assert len(receiver.got) == 1
    assert [message.partition(",")[0] for message in caplog.messages] == ["alert could not be recorded"]


def test_a_url_in_the_yaml_is_refused():
    with pytest.raises(ValidationError, match="expected the name of an environment variable with the URL"):
        AlertSettings(slack_env="https://hooks.slack.com/services/T0/B0/topsecret")
