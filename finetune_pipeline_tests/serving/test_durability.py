"""Answered requests are recorded despite kills of the gateway, a locked database and a full disk."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import httpx
import pytest
import sqlalchemy as sa

from finetune_pipeline.database import connect, tables
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.feedback.write_ahead_log import write_ahead_log_folder
from finetune_pipeline.settings import load_loop
from finetune_pipeline_tests.serving.conftest import PROMPT, events, free_port, make_loop, process, serving
from finetune_pipeline_tests.waiting import wait_until


@pytest.fixture(autouse=True)
def fresh_home(tmp_path, monkeypatch):
    """Give each test its own home with the default loop's base model."""
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    base_gguf(load_loop("aec_parser"), print)


class Users:
    """Eight clients, half of them streaming, that send requests and feedback until the gateway is killed."""

    def __init__(self, url: str) -> None:
        self.answered: set[str] = set()
        self.rated: set[str] = set()
        self._url = url
        self._threads = [threading.Thread(target=self._use, args=(n % 2 == 0,)) for n in range(8)]
        for thread in self._threads:
            thread.start()

    def _use(self, stream: bool) -> None:
        body = {"model": "aec_parser", "messages": [{"role": "user", "content": PROMPT}], "stream": stream}
        with httpx.Client(base_url=self._url, timeout=30) as http:
            try:
                while True:
                    response = http.post("/v1/chat/completions", json=body)
                    id = events(response)[0]["id"] if stream else response.json()["id"]
                    assert id == response.headers["x-interaction-id"]
                    self.answered.add(id)
                    receipt = http.post("/v1/feedback", json={"interaction_id": id, "kind": "thumbs_up"}).json()
                    self.rated.add(receipt["id"])
            except (httpx.TransportError, AssertionError, IndexError):
                return  # it was killed, perhaps in the middle of a stream

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def stored(table):
    with connect().read() as connection:
        return list(connection.execute(sa.select(table.c.id)).scalars())


def kill(gateway):
    os.kill(gateway.pid, signal.SIGKILL)
    gateway.wait()


def test_every_answered_request_survives_a_kill_of_the_gateway():
    answered, rated, port = set(), set(), free_port()
    for round_ in range(2):
        with process(port=port) as (running, gateway):
            users = Users(running.url)
            wait_until(lambda users=users: len(users.rated) > 40)
            if round_ == 1:  # with the store locked, events are in the write-ahead log only
                lock = sqlite3.connect(connect().engine.url.database, isolation_level=None)
                lock.execute("BEGIN IMMEDIATE")
                before = len(users.answered)
                wait_until(lambda users=users, before=before: len(users.answered) > before + 4)
            kill(gateway)
            users.join()
            if round_ == 1:
                lock.close()
        answered |= users.answered
        rated |= users.rated
    assert [path.suffix for path in write_ahead_log_folder().iterdir()].count(".jsonl") == 1
    ingested = subprocess.run(
        [sys.executable, "-m", "finetune_pipeline.cli.main", "ingest"], capture_output=True, text=True, timeout=120
    )
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    interactions, thumbs = stored(tables.interactions), stored(tables.feedback)
    assert answered <= set(interactions)
    assert rated <= set(thumbs)
    assert len(interactions) == len(set(interactions))
    assert not list(write_ahead_log_folder().glob("*.jsonl"))


def test_a_gateway_recovers_the_events_of_a_killed_one():
    port = free_port()
    with process(port=port) as (running, gateway):
        lock = sqlite3.connect(connect().engine.url.database, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        ids = [running.ask(model="aec_parser").json()["id"] for _ in range(3)]
        kill(gateway)
        lock.close()
    assert stored(tables.interactions) == []
    with process(port=port) as (running, gateway):
        assert [running.interaction(id)["interaction"]["id"] for id in ids] == ids
    assert sorted(stored(tables.interactions)) == sorted(ids)


def test_an_orderly_shutdown_leaves_no_write_ahead_log():
    with process(port=free_port()) as (running, gateway):
        ids = {running.ask(model="aec_parser").json()["id"] for _ in range(5)}
        gateway.send_signal(signal.SIGTERM)
        gateway.wait(60)
        output = gateway.stdout.read()
    assert "Traceback" not in output
    assert set(stored(tables.interactions)) == ids
    assert list(write_ahead_log_folder().iterdir()) == []


def test_the_address_is_printed_when_the_gateway_answers():
    port = free_port()
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as gateway:
        try:
            lines = []
            while "ready: " not in (lines or [""])[-1]:
                lines.append(next(gateway.stdout))  # StopIteration if the gateway ends before
            assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).is_success
        finally:
            gateway.kill()
    assert lines[0].startswith("starting the gateway for ")
    assert lines[-1].startswith(f"ready: OpenAI base URL http://127.0.0.1:{port}/v1 ")


def test_a_locked_database_delays_no_answer_and_loses_none():
    with serving(make_loop()) as gateway:
        gateway.ask()
        lock = sqlite3.connect(connect().engine.url.database, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        answers = [gateway.ask(max_tokens=8).json() for _ in range(10)]
        assert all(answer["id"] for answer in answers)  # while the database is locked
        assert gateway.metric("finetune_write_ahead_log_pending_bytes") > 0
        receipt = gateway.http.post("/v1/feedback", json={"interaction_id": answers[0]["id"], "kind": "thumbs_up"})
        assert (receipt.status_code, receipt.json()["status"]) == (202, "accepted")
        assert gateway.ask().status_code == 200
        lock.execute("COMMIT")
        lock.close()
        wait_until(lambda: gateway.metric("finetune_write_ahead_log_pending_bytes") == 0)
        for answer in answers:
            assert gateway.interaction(answer["id"])["interaction"]["id"] == answer["id"]
        assert len(gateway.interaction(answers[0]["id"])["feedback"]) == 1


def test_on_a_full_disk_requests_are_not_answered(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk to fill can only be mounted by root here: {mount.stderr.strip()}")
    try:
        monkeypatch.setattr("finetune_pipeline.feedback.write_ahead_log.write_ahead_log_folder", lambda: disk)
        with serving(make_loop()) as gateway:
            kept = gateway.ask().json()["id"]
            gateway.interaction(kept)  # waits until the write-ahead log is empty
            (disk / "filler").write_bytes(b"x" * 60_000)
            with open(disk / "filler", "ab", buffering=0) as file:  # noqa: PTH123
                try:
                    while True:
                        file.write(b"x" * 512)
                except OSError:
                    pass
            for stream in (False, True):
                response = gateway.ask("a long request " * 20, stream=stream, max_tokens=16)
                if stream:
                    assert "the disk is full" in response.text and "[DONE]" not in response.text
                else:
                    assert (response.status_code, response.headers["retry-after"]) == (503, "30")
                    assert "The event cannot be recorded, so it is not accepted" in response.json()["error"]["message"]
            lost = gateway.http.post("/v1/feedback", json={"interaction_id": kept, "kind": "thumbs_up"})
            assert lost.status_code == 503
            assert gateway.metric("finetune_in_flight") == 0
            (disk / "filler").unlink()
            again = gateway.ask().json()["id"]
            assert gateway.interaction(again)["feedback"] == []
        assert sorted(stored(tables.interactions)) == sorted([kept, again])
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_with_the_whole_home_on_a_full_disk_nothing_acknowledged_is_lost(tmp_path, monkeypatch):
    """The store, its journal and the write-ahead log are on the disk; the model is not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk to fill can only be mounted by root here: {mount.stderr.strip()}")
    try:
        for folder in (tmp_path / "home").iterdir():
            if folder.is_dir():
                (disk / folder.name).symlink_to(folder)
        monkeypatch.setenv("FINETUNE_HOME", str(disk))
        acknowledged, rated, refused = [], [], set()

        def use(gateway, times):
            for number in range(times):
                response = gateway.ask(f"request {number} " * 40, stream=False, max_tokens=8)
                if response.status_code == 200:
                    acknowledged.append(response.json()["id"])
                    given = {"interaction_id": acknowledged[-1], "kind": "thumbs_up"}
                    response = gateway.http.post("/v1/feedback", json=given)
                    if response.is_success:
                        rated.append(response.json()["id"])
                if not response.is_success:
                    refused.add((response.status_code, response.json()["error"]["message"]))

        with serving(make_loop()) as gateway:
            use(gateway, 4)
            assert not refused
            filler = disk / "filler"
            with open(filler, "ab", buffering=0) as file:  # noqa: PTH123
                for size in (65_536, 4_096, 512):
                    try:
                        while True:
                            file.write(b"x" * size)
                    except OSError:
                        pass
            use(gateway, 12)
            assert {status for status, _ in refused} == {503}
            assert [said for _, said in refused if "cannot be recorded, so it is not accepted" not in said] == []
            before = len(acknowledged)
            filler.unlink()
            use(gateway, 4)
            assert len(acknowledged) == before + 4
            wait_until(lambda: set(acknowledged) <= set(stored(tables.interactions)))
        assert sorted(stored(tables.interactions)) == sorted(acknowledged)
        assert set(rated) <= set(stored(tables.feedback))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
