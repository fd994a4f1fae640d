"""The teacher over real HTTP: cache, retries, budget and errors."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from finetune_pipeline.settings import PROJECT_ROOT, home
from finetune_pipeline.sources import teacher as module
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError
from finetune_pipeline.sources.teacher import Teacher, TeacherRequest
from finetune_pipeline_tests.waiting import wait_until

from .endpoint import error, said, teaching


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.02)


def question(name, answer=50):
    return TeacherRequest(name, None, "You teach.", f"Request {name}", answer)


def ask(settings, *names, answer=50):
    """Return the text of each answer, or the reason why there is none."""
    told = {}
    for one in Teacher(settings).answers(question(name, answer) for name in names):
        if isinstance(one, SkippedRecord):
            told[one.provenance] = one.reason
        else:
            told[one[0].provenance] = one[1]
    return told


def echo(body, number):
    return said(body["messages"][-1]["content"].replace("Request", "Answer"))


def test_answers_keep_the_order_of_requests_and_are_paid_once():
    names = [f"q{n}" for n in range(20)]

    def together(body, number):
        wait_until(lambda: server.most_at_once >= 2)
        return echo(body, number)

    with teaching(together, timeout_seconds=60) as (server, settings):
        assert list(ask(settings, *names).items()) == [(name, f"Answer {name}") for name in names]
        assert ask(settings, *names)["q7"] == "Answer q7"
        assert len(server.asked) == 20
        assert 2 <= server.most_at_once <= settings.parallel
        ask(settings.model_copy(update={"model": "another"}), "q1")
        assert len(server.asked) == 21
        assert server.asked[0]["model"] == "m"
        assert server.asked[0]["max_tokens"] == 50


def test_concurrent_identical_requests_are_sent_once(monkeypatch):
    waiting, lock = [], module.FileLock
    monkeypatch.setattr(module, "FileLock", lambda path: waiting.append(path) or lock(path))

    def last(body, number):
        wait_until(lambda: len(waiting) == 4)  # all four found no answer in the cache
        return echo(body, number)

    with teaching(last, parallel=4, timeout_seconds=60) as (server, settings):
        asked = [TeacherRequest(str(n), n, "You teach.", "the very same", 50) for n in range(4)]
        assert [request.task for request, text in Teacher(settings).answers(asked) if text] == [0, 1, 2, 3]
        assert len(server.asked) == 1


def test_waits_double_up_to_a_minute(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    with teaching(lambda body, number: error(500), attempts=9) as (server, settings):
        teacher, waits = Teacher(settings), []
        monkeypatch.setattr(teacher._stopped, "wait", waits.append)
        (answer,) = teacher.answers([question("a")])
        assert "500" in answer.reason and len(server.asked) == 9
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


class Clock:
    """A clock that moves only by `seconds`."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds


def test_retry_after_is_respected(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    def busy_at_first(body, number):
        return error(429, **{"Retry-After": "1"}) if number == 1 else echo(body, number)

    with teaching(busy_at_first) as (server, settings):
        teacher, waits = Teacher(settings), []

        def wait(seconds):
            waits.append(seconds)
            clock.seconds += seconds

        monkeypatch.setattr(teacher._stopped, "wait", wait)
        [(request, text)] = teacher.answers([question("a")])
        assert (request.provenance, text) == ("a", "Answer a")
        assert len(server.asked) == 2
    [waited] = waits
    assert 1 <= waited < 1.2


def test_a_retry_after_of_an_hour_is_given_up():
    with teaching(lambda body, number: error(429, **{"Retry-After": "3600"})) as (server, settings):
        assert "asks to retry after 3600 seconds" in ask(settings, "a")["a"]
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        error(500),
        error(503, **{"Retry-After": "0"}),
        (200, {}, b"<html>proxy error</html>"),
        (200, {}, b'{"error": {"message": "overloaded"}}'),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[[[" * 100_000),
        (200, {"Content-Length": "9999"}, b'{"choices"'),  # the connection breaks
    ],
    ids=["500", "503", "html", "error", "empty", "deep", "broken"],
)
def test_a_single_failure_is_retried(fault):
    def script(body, number):
        return fault if number == 1 else echo(body, number)

    with teaching(script, timeout_seconds=2) as (server, settings):
        assert ask(settings, "a") == {"a": "Answer a"}
        assert len(server.asked) == 2


def test_a_timeout_is_retried():
    given_up = threading.Event()

    def script(body, number):
        if number == 1:
            given_up.wait(60)
        return echo(body, number)

    with teaching(script, timeout_seconds=0.7) as (server, settings):
        assert ask(settings, "a") == {"a": "Answer a"}
        given_up.set()
        assert len(server.asked) >= 2


def test_an_endpoint_that_is_down_ends_the_sync_and_answers_are_kept():
    def script(body, number):
        return echo(body, number) if "good" in body["messages"][-1]["content"] else error(500)

    with teaching(script, attempts=2, parallel=1) as (server, settings):
        with pytest.raises(SourceError, match=r"none of 3 requests in a row .*500.*its earlier answers are kept"):
            ask(settings, "good", "b", "c", "d", "e")
        before = len(server.asked)
        assert ask(settings, "good") == {"good": "Answer good"}
        assert len(server.asked) == before


def test_the_budget_is_never_exceeded_and_the_next_sync_resumes():
    names = [f"q{n}" for n in range(12)]
    with teaching(echo, max_tokens=500, parallel=3) as (server, settings):
        first = ask(settings, *names)
        assert 100 * len(server.asked) <= 500
        assert {text for text in first.values() if text.startswith("budget")} == {
            "budget: the 500 tokens of one sync (teacher.max_tokens) are spent; the next sync resumes here"
        }
        for _ in range(5):
            given = ask(settings, *names)
            assert [name for name, text in first.items() if text.startswith("Answer") and given[name] != text] == []
        assert all(text.startswith("Answer") for text in given.values())
        assert set(server.by_question.values()) == {1}


def test_usage_is_estimated_from_text_length_if_it_is_missing():
    def silent(body, number):
        return 200, {}, b'{"choices": [{"message": {"content": "Answer"}, "finish_reason": "stop"}], "usage": null}'

    with teaching(silent, max_tokens=400, parallel=1) as (server, settings):
        ask(settings, *"abcdefghij")
        assert 1 < len(server.asked) < 8


@pytest.mark.parametrize(("fault", "asked"), [((200, {}, b"<html>proxy error</html>"), 2), (error(500), 4)])
def test_a_reply_that_may_have_been_paid_counts_in_full(fault, asked):
    # A request reserves a little over 100 tokens: two of them are within the budget.
    with teaching(lambda body, number: fault, max_tokens=250, attempts=4) as (server, settings):
        assert ask(settings, "a")["a"].startswith("budget" if asked == 2 else "the teacher gave no answer")
        assert len(server.asked) == asked


def test_a_closed_sync_waits_only_for_running_requests(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 60.0)

    def script(body, number):
        return echo(body, number) if "good" in body["messages"][-1]["content"] else error(500)

    with teaching(script, parallel=2) as (server, settings):
        teacher, started, interrupted = Teacher(settings), [], []
        real = teacher._stopped.wait

        def wait(seconds):
            started.append(seconds)
            interrupted.append(real(seconds))

        monkeypatch.setattr(teacher._stopped, "wait", wait)
        answers = teacher.answers([question("good"), *(question(f"q{n}") for n in range(4))])
        assert next(answers)[1] == "Answer good"
        wait_until(lambda: len(started) == 2)  # then both threads wait to retry
        answers.close()
        assert interrupted == [True, True]  # by the end of the sync, not by the time
        assert len(server.asked) == 3


def test_a_missing_or_wrong_key_is_reported_and_never_shown(monkeypatch):
    def wrong(body, number):
        return error(401, "Incorrect API key provided: sk-very-secret-value")

    with teaching(wrong, api_key_env="TEACHER_KEY") as (server, settings):
        with pytest.raises(SourceError, match="TEACHER_KEY is not set"):
            Teacher(settings)
        monkeypatch.setenv("TEACHER_KEY", "sk-very-secret-value")
        with pytest.raises(SourceError, match="TEACHER_KEY") as raised:
            ask(settings, "a")
        assert "secret-value" not in str(raised.value)
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret-value"
        server.script = lambda body, number: error(422, "key sk-very-secret-value is not good for this")
        assert "secret-value" not in ask(settings, "a")["a"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said("I'm sorry, but I can't help with that."), "refused to answer"),
        (said(None, refusal="no"), "refused to answer"),
        (said("half an ans", finish="length"), "cut off at 50 tokens"),
        (said("  "), "is empty"),
    ],
)
def test_an_unusable_answer_has_a_reason_and_is_not_paid_again(reply, reason):
    with teaching(lambda body, number: reply) as (server, settings):
        assert reason in ask(settings, "a")["a"]
        assert reason in ask(settings, "a")["a"]
        assert len(server.asked) == 1


def test_thoughts_before_an_answer_are_removed():
    with teaching(lambda body, number: said("<think>\nHm.\n</think>\n\nAnswer")) as (_, settings):
        assert ask(settings, "a") == {"a": "Answer"}


def test_the_newer_name_of_the_token_limit_is_used_if_required():
    def newer(body, number):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return echo(body, number)

    with teaching(newer, parallel=1) as (server, settings):
        assert ask(settings, "a", "b") == {"a": "Answer a", "b": "Answer b"}
        assert [body.get("max_completion_tokens") for body in server.asked] == [None, 50, 50]


ASK_30 = """
import sys
from finetune_pipeline.settings import TeacherSettings
from finetune_pipeline.sources.teacher import TeacherRequest, Teacher
settings = TeacherSettings(url=sys.argv[1], model="m", parallel=3)
requests = [TeacherRequest("", n, "You teach.", f"Request q{n}", 50) for n in range(30)]
print(sum(bool(text) for _, text in Teacher(settings).answers(requests)))
"""


def test_a_kill_loses_at_most_running_requests():
    killed = threading.Event()

    def script(body, number):
        if number > 10:
            killed.wait(60)
        return echo(body, number)

    with teaching(script) as (server, settings):
        command = [sys.executable, "-c", ASK_30, settings.url]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "FINETUNE_HOME": str(home())}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            wait_until(lambda: len(server.asked) >= 10)
            process.send_signal(signal.SIGKILL)
        killed.set()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "30"
        assert len(server.asked) <= 30 + 3
        assert len(server.by_question) == 30
