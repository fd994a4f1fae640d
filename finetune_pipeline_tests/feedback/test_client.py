"""The feedback client, into a real database and over real HTTP."""

import asyncio
import json
import math
import re
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psutil
import pytest
import sqlalchemy as sa

from finetune_pipeline.database import DatabaseError, connect, connection
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback import FeedbackClient, FeedbackError, store
from finetune_pipeline.feedback import client as client_module
from finetune_pipeline.feedback.client import event_id
from finetune_pipeline.settings import FeedbackSettings, SettingsError
from finetune_pipeline_tests.conftest import feedback, interaction, uid

HEAVY = ["torch", "dagster", "alembic", "fastapi", "pandas", "pyarrow", "sqlalchemy", "httpx", "transformers"]
VALID = '{"element":"wall","material":"brick","thickness_mm":250}'
"""An answer under the output schema of aec_parser."""


@pytest.fixture
def client(db, loop):
    return FeedbackClient(loop, database=db)


@pytest.fixture
def remote(gateway):
    with FeedbackClient("notes", url=gateway.url, api_key=gateway.key) as client:
        yield client


def example(db, id):
    with db.read() as connection:
        return store.find_interaction(connection, id).example


def counted(db):
    with db.read() as connection:
        return store.counters(connection, "notes")


def test_importing_the_client_loads_nothing_heavy():
    script = f"""
import json, sys
from finetune_pipeline.feedback import FeedbackClient
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == []


def test_logging_into_the_store_loads_neither_torch_nor_dagster_nor_http(own_home):
    FeedbackClient("aec_parser")  # makes the tables, for which Alembic is needed once
    script = f"""
import json, sys
from finetune_pipeline.feedback import FeedbackClient
client = FeedbackClient("aec_parser")
client.correct(client.log("a wall", "no"), {VALID!r})
print(json.dumps([sorted(set({HEAVY!r}) & set(sys.modules)), client.stats()]))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded, stats = json.loads(said)
    assert loaded == ["sqlalchemy"]
    assert stats == {"interactions": 1, "feedback": 1, "feedback.correction": 1, "examples": 1, "corrected": 1}


def test_an_interaction_and_a_correction_become_an_example(client, db):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    id = client.log("a wall", "{}", history=turns, model="notes@v1.0.0", confidence=0.4, user="u1", latency_ms=12)
    assert client.last_id == id and id.version == 7
    client.correct(id, '{"element": "wall"}', user="u2")
    found = example(db, id)
    assert (found.target, found.corrected, found.prompt) == ('{"element": "wall"}', True, "a wall")
    assert [turn.content for turn in found.history] == ["hello", "hi"]


@pytest.mark.parametrize(
    ("give", "reward", "confirmed"),
    [
        (lambda client, id: client.thumbs_up(id, user="u1"), 1.0, True),
        (lambda client, id: client.thumbs_up(id, strength=0), 0.7, True),
        (lambda client, id: client.thumbs_down(id), -1.0, False),
        (lambda client, id: client.rate(id, "gold"), 1.0, True),
        (lambda client, id: client.rate(id, "4"), 0.55, True),  # the reward of four stars in this loop
        (lambda client, id: client.rate(id, "1"), -1.0, False),
        (lambda client, id: client.validate(id, 100), 1.0, False),
        (lambda client, id: client.validate(id, 70), 0.25, False),  # between failure and success
        (lambda client, id: client.validate(id, 0), -1.0, False),
        (lambda client, id: client.reward(id, 0.5), 0.5, False),
    ],
)
def test_each_kind_of_feedback_has_its_reward(db, loop, give, reward, confirmed):
    ratings = {**FeedbackSettings().ratings, "4": 0.55}
    loop = loop.model_copy(update={"feedback": FeedbackSettings(ratings=ratings)})
    client = FeedbackClient(loop, database=db)
    id = client.log("a wall", "{}")
    given = give(client, id)
    assert isinstance(given, UUID) and given != id
    found = example(db, id)
    assert found.reward == pytest.approx(reward)
    assert found.confirmed is confirmed


def test_a_thumb_on_the_corrected_text_counts_for_that_text(client, db):
    id = client.log("a wall", "{}")
    client.correct(id, "wrong too")
    client.thumbs_down(id)  # on the old answer: the correction stands
    assert example(db, id).corrected
    client.thumbs_down(id, output="wrong too")
    assert not example(db, id).corrected


def test_a_key_or_an_id_makes_a_call_safe_to_repeat(client, db):
    first = client.log("a wall", "{}", key="request 7")
    assert client.log("a wall", "{}", key="request 7") == first == event_id("notes", "request 7")
    assert client.log("again", "{}", id=uid("x")) == client.log("again", "{}", id=str(uid("x"))) == uid("x")
    assert client.thumbs_up(first, key="click 1") == client.thumbs_up(first, key="click 1")
    assert client.thumbs_up(first, key="click 2") != client.thumbs_up(first, key="click 1")
    assert (counted(db)["interactions"], counted(db)["feedback"]) == (2, 2)
    assert event_id("other", "request 7") != first


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda c: c.reward(uid("a"), 7), "reward"),
        (lambda c: c.reward(uid("a"), math.nan), "reward"),
        (lambda c: c.validate(uid("a"), math.nan), "score"),
        (lambda c: c.validate(uid("a"), 101), "score"),
        (lambda c: c.thumbs_up(uid("a"), strength=-1), "score"),
        (lambda c: c.rate(uid("a"), "6"), "rating"),
        (lambda c: c.correct(uid("a"), "  "), "correction"),
        (lambda c: c.correct(uid("a"), "a\x00b"), "NUL"),
        (lambda c: c.correct("../../etc/passwd", "x"), "interaction_id"),
        (lambda c: c.log("a", "b", id="../../etc/passwd"), "expected a UUID"),
        (lambda c: c.log("a", "b", id=7), "expected a UUID"),
        (lambda c: c.log("a", "b", id=uid("a"), key="k"), "not both"),
        (lambda c: c.log("a", "b", key=""), "key"),
        (lambda c: c.log("", "b"), "prompt"),
        (lambda c: c.log("a", None), "output"),
        (lambda c: c.log("a", "b", confidence=math.inf), "confidence"),
        (lambda c: c.log("a", "b", user="u" * 201), "user"),
        (lambda c: c.log("a", "b\ud800"), "surrogate"),
        (lambda c: c.log("a", "b", surprise=1), "surprise"),
        (lambda c: c.log("a", "b", source="imported"), "source, provenance: set only"),
        (lambda c: c.log("a", "b", history=[{"role": "robot", "content": ""}]), "history"),
        (lambda c: c.log_many([{"prompt": "a", "output": "b", "loop": "other"}]), "expected 'notes'"),
    ],
)
def test_invalid_input_is_rejected_by_field_and_not_stored(client, db, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(client)
    assert counted(db) == {}


@pytest.mark.parametrize("text", ["'; DROP TABLE interactions; --", "%s {0} \\ \" '", "ünïcödé 🚧", "x" * 1_000_000])
def test_every_text_is_data(client, db, text):
    short = text[:200]
    fields = dict.fromkeys(("model", "user", "domain", "kind", "variant", "flag"), short)
    id = client.log(text, text, retrieved_context=text, history=[{"role": "user", "content": text}], **fields)
    client.correct(id, text + " better", user=short, key=text)
    with db.read() as connection:
        found = store.find_interaction(connection, id)
    logged = found.interaction
    assert {logged.prompt, logged.output, logged.retrieved_context, logged.history[0].content} == {text}
    assert {getattr(logged, name) for name in fields} == {short}
    assert (found.feedback[0].correction, found.feedback[0].user) == (text + " better", short)


def test_many_events_are_stored_together_and_once(client, db):
    known = [interaction("a"), feedback("f", "a", "thumbs_up")]
    mappings = [{"prompt": f"p{i}", "output": "o"} for i in range(2_500)]
    late = {"interaction_id": str(uid("a")), "kind": "rating", "rating": "5", "id": uid("late")}
    assert client.log_many(event for event in [*known, *mappings, late]) == 2_503
    assert client.log_many([*known, late]) == 0
    assert counted(db)["feedback.rating"] == 1


def test_a_renamed_field_is_refused_with_its_new_name(client, db):
    with pytest.raises(ValueError, match=r"^origin: unknown field; renamed to provenance$"):
        client.log("a wall", "an answer", origin="app")
    assert counted(db)["interactions"] == 0


def test_an_invalid_event_affects_only_its_batch(client, db):
    good = [{"prompt": f"p{i}", "output": "o"} for i in range(1_500)]
    with pytest.raises(ValueError, match="output"):
        client.log_many([*good, {"prompt": "without an answer"}])
    assert counted(db)["interactions"] == 1_000


def test_the_same_key_from_16_threads_at_once_is_one_feedback(client, db):
    id = client.log("a wall", "{}")
    start = threading.Barrier(16)
    given, faults = [], []

    def give():
        start.wait()
        try:
            given.append(client.correct(id, "better", key="click"))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=give) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert given == [event_id("notes", "click")] * 16
    assert (counted(db)["feedback"], counted(db)["corrected"]) == (1, 1)


class Clock:
    """A clock that moves only by `seconds`."""

    def __init__(self):
        self.seconds = 1000.0

    def perf_counter(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock that the client measures the latency with."""
    made = Clock()
    monkeypatch.setattr(client_module, "time", made)
    return made


def test_a_call_is_logged_with_its_latency(client, db, clock):
    with client.call("a wall", user="u1") as call:
        clock.seconds += 0.02
        call.output = "{}"
        call.details["confidence"] = 0.7
    with db.read() as connection:
        found = store.find_interaction(connection, call.id).interaction
    assert (found.prompt, found.output, found.user, found.confidence) == ("a wall", "{}", "u1", 0.7)
    assert found.latency_ms == pytest.approx(20)
    assert client.last_id == call.id


def test_a_call_that_fails_is_not_logged_and_one_without_output_is_an_error(client, db):
    with pytest.raises(KeyError), client.call("a wall") as call:
        call.output = "half"
        raise KeyError("the model broke")
    with pytest.raises(FeedbackError, match=r"Set call\.output"), client.call("a wall"):
        pass
    assert counted(db) == {}


def test_a_decorated_function_is_logged_and_returns_its_result(client, db):
    @client.logged
    def answer(prompt: str, *, times: int = 1) -> list[str]:
        """Answers."""
        return [prompt] * times

    assert answer.__name__ == "answer" and answer.__doc__ == "Answers."
    assert answer("a wall", times=2) == ["a wall", "a wall"]
    first = client.last_id
    assert answer(prompt="a door") == ["a door"]
    assert client.last_id != first
    client.thumbs_up(client.last_id)
    assert (example(db, client.last_id).prompt, example(db, client.last_id).target) == ("a door", '["a door"]')
    with db.read() as connection:
        assert store.find_interaction(connection, first).interaction.output == '["a wall", "a wall"]'


@pytest.mark.parametrize(
    ("prompt", "result", "reason"),
    [
        ("a wall", object(), "the answer is an object (object), expected a text or JSON"),
        ("a wall", {"value": object()}, "the answer is an object (dict)"),
        (
            "a wall",
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "the answer is an object (dict)",
        ),
        ([{"role": "user", "content": "a wall"}], "x", "the prompt is an object (list), expected a text"),
        (7, "x", "the prompt is an object (int), expected a text"),
    ],
)
def test_an_object_is_never_logged_as_its_repr(client, db, caplog, prompt, result, reason):
    async def answer_async(prompt):
        return result

    assert client.logged(lambda prompt: result)(prompt) is result
    assert asyncio.run(client.logged(answer_async)(prompt)) is result
    assert counted(db) == {} and caplog.text.count(f"is returned: {reason}") == 2


def test_each_decorated_coroutine_knows_its_own_interaction(client, db, clock):
    started, answered, logged = (asyncio.Barrier(10) for _ in range(3))

    @client.logged
    async def answer(prompt: str) -> str:
        if await started.wait() == 0:  # all coroutines run
            clock.seconds += 0.01
        await answered.wait()
        return prompt.upper()

    async def one(prompt: str) -> tuple[str, UUID]:
        said = await answer(prompt)
        await logged.wait()  # until the others have logged too
        return said, client.last_id

    async def all_of_them():
        return await asyncio.gather(*(one(f"prompt {i}") for i in range(10)))

    for i, (said, id) in enumerate(asyncio.run(all_of_them())):
        assert said == f"PROMPT {i}"
        with db.read() as connection:
            found = store.find_interaction(connection, id).interaction
        assert (found.prompt, found.output) == (f"prompt {i}", said)
        assert found.latency_ms == pytest.approx(10)


def stream(prompt):
    yield prompt


def method(self, prompt):
    return prompt


@pytest.mark.parametrize("function", [stream, method, lambda: "nothing asked"], ids=["generator", "method", "nullary"])
def test_a_function_that_cannot_be_decorated_is_rejected_with_advice(client, function):
    with pytest.raises(TypeError, match=r"with client\.call"):
        client.logged(function)


def test_a_locked_database_is_an_error_and_stores_nothing(tmp_path, monkeypatch, loop):
    monkeypatch.setattr(connection, "_BUSY_MS", 100)
    path = tmp_path / "locked.db"
    client = FeedbackClient(loop, database=connect(f"sqlite:///{path}"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="another program has been writing"):
        client.log("a wall", "{}", key="k")
    other.execute("ROLLBACK")
    assert client.stats() == {}
    client.log("a wall", "{}", key="k")
    assert client.stats() == {"interactions": 1}


def test_an_unknown_loop_is_an_error_at_once():
    with pytest.raises(SettingsError, match=r"No loop is named 'nobody'\. .* are: aec_parser"):
        FeedbackClient("nobody")


def test_one_client_writes_to_one_place(db):
    with pytest.raises(ValueError, match="not both"):
        FeedbackClient("notes", url="http://127.0.0.1:1", database=db)


def test_over_http_the_gateway_gets_the_same_events(remote, gateway):
    with remote.call("a wall", user="u1") as call:
        call.output = "{}"
    id = remote.log("ünïcödé 🚧 '; DROP TABLE x", "{}", key="k", history=[{"role": "user", "content": "hi"}])
    given = remote.correct(id, "better", user="u2", key="c")
    remote.rate(id, "gold")
    assert remote.correct(id, "better", user="u2", key="c") == given
    first, second = gateway.interactions
    assert (first["prompt"], first["user"], first["loop"]) == ("a wall", "u1", "notes")
    assert second["history"] == [{"role": "user", "content": "hi"}]
    assert second["id"] == str(event_id("notes", "k"))
    correction, rating = gateway.feedback
    assert "event" not in {*first, *correction}
    assert None not in [*first.values(), *correction.values()]
    assert (correction["kind"], correction["correction"], correction["interaction_id"]) == (
        "correction",
        "better",
        str(id),
    )
    assert rating["rating"] == "gold"
    assert remote.stats() == {"interactions": 2, "feedback": 2, "feedback.correction": 1, "feedback.rating": 1}


def test_over_http_many_events_count_once(remote):
    events = [interaction("a"), feedback("f", "a", "thumbs_up"), feedback("g", "nobody", "thumbs_up")]
    assert remote.log_many(events) == 3
    assert remote.log_many([*events, interaction("b")]) == 1


def test_over_http_one_client_serves_16_threads(remote, gateway):
    threads = [threading.Thread(target=remote.thumbs_up, args=(uid("a"),), kwargs={"key": "k"}) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item["id"] for item in gateway.feedback] == [str(event_id("notes", "k"))]


def test_over_http_the_gateways_message_is_the_error(gateway):
    with (
        FeedbackClient("notes", url=gateway.url) as client,
        pytest.raises(FeedbackError, match="401 Unauthorized: this needs an API key with the scope feedback"),
    ):
        client.log("a wall", "{}")


@pytest.mark.parametrize("status", ["recorded", "duplicate", "unmatched", "accepted", "refused"])
def test_over_http_the_gateways_status_decides(remote, gateway, status):
    gateway.status = status
    if status == "refused":
        with pytest.raises(FeedbackError, match=r"did not record the event .*'refused'"):
            remote.log("a wall", "{}")
    else:
        assert remote.log_many([interaction("a")]) == (status != "duplicate")


def test_a_repeated_call_with_other_content_logs_a_warning(client, caplog):
    check_contradictions(client, caplog)


def test_over_http_a_repeated_call_with_other_content_logs_a_warning(remote, caplog):
    check_contradictions(remote, caplog)


def test_a_time_in_the_future_is_rejected(client):
    later = datetime.now(UTC) + timedelta(days=1)
    with pytest.raises(ValueError, match=r"created_at: .* is in the future"):
        client.log("a wall", "{}", created_at=later)
    with pytest.raises(ValueError, match=r"created_at: .* is in the future"):
        client.log_many([interaction("a", created_at=later)])
    assert client.stats() == {}


def check_contradictions(client, caplog):
    client.log("a wall", "{}", key="k")
    assert client.log("a wall", "{}", key="k") == event_id("notes", "k")
    assert caplog.text == ""
    assert client.log("a wall", "another answer", key="k") == event_id("notes", "k")
    assert client.log_many([interaction("a"), interaction("a", output="other"), interaction("b")]) == 2
    for id in (event_id("notes", "k"), uid("a")):
        assert len(re.findall(f"{id} already exists with different content", caplog.text)) == 1


def test_over_http_a_server_that_is_no_gateway_is_reported(gateway):
    with (
        FeedbackClient("notes", url=f"{gateway.url}/elsewhere", api_key=gateway.key) as client,
        pytest.raises(FeedbackError, match=r"404 Not Found .* Is its address right"),
    ):
        client.log("a wall", "{}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no address", "127.0.0.1:8484"])
def test_over_http_an_unreachable_gateway_is_reported_with_advice(url):
    client = FeedbackClient("notes", url=url)
    with pytest.raises(FeedbackError, match="finetune serve"):
        client.log("a wall", "{}")


def test_invalid_input_never_reaches_the_gateway(remote, gateway):
    with pytest.raises(ValueError, match="reward"):
        remote.reward(uid("a"), 7)
    assert gateway.feedback == []


def test_many_events_need_few_transactions_and_little_memory(tmp_path, loop):
    # `python -m benchmarks` measures the speed; here only what the speed depends on.
    database = connect(f"sqlite:///{tmp_path / 'speed.db'}")
    client = FeedbackClient(loop, database=database)
    commits = []
    sa.event.listen(database.engine, "commit", commits.append)
    for number in range(200):
        client.log(f"prompt {number}", "answer")
    assert len(commits) == 200
    memory = psutil.Process()
    client.log_many({"prompt": f"p{i}", "output": "o"} for i in range(2_000))
    commits.clear()
    before = memory.memory_info().rss
    assert client.log_many({"prompt": f"q{i}", "output": "o"} for i in range(20_000)) == 20_000
    assert len(commits) == 20
    assert memory.memory_info().rss - before < 20e6


def test_no_two_rows_share_an_ingest_offset(client, db):
    client.log_many([interaction("a"), interaction("b"), feedback("f", "a", "thumbs_up")])
    with db.read() as connection:
        numbers = [
            n
            for table in (t.interactions, t.feedback)
            for n in connection.execute(sa.select(table.c.ingest_offset)).scalars()
        ]
    assert len(set(numbers)) == 3


def test_a_failed_log_does_not_cost_the_answer(caplog):
    with FeedbackClient("aec_parser", url="http://127.0.0.1:9") as nobody_there:
        assert nobody_there.logged(lambda prompt: prompt.upper())("a wall") == "A WALL"
        with nobody_there.call("a wall") as call:
            call.output = "an answer"
        with nobody_there.call("a wall", user="u" * 201) as call:
            call.output = "an answer with \x00"
    assert caplog.text.count("was not logged, but its answer is returned") == 3
