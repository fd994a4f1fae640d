"""The champion changes under load: no request fails, and every answer names its model."""

import asyncio
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.registry import champion
from finetune_pipeline.serving import loop_server
from finetune_pipeline_tests.processes import descendants
from finetune_pipeline_tests.serving.conftest import PROMPT, Running, events, make_loop, promote, serving
from finetune_pipeline_tests.waiting import wait_until


def engines() -> set[int]:
    """Return the process ids of all engines of this process."""
    return {process.pid for process in descendants("finetune_pipeline.inference.worker")}


class Load:
    """Eight clients that send requests all the time, half of them streaming."""

    def __init__(self, running: Running, model: str) -> None:
        self.answers: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self.interrupted = 0
        self._running, self._model, self._stop = running, model, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n % 2 == 0,)) for n in range(8)]

    def _ask(self, stream: bool) -> None:
        with httpx.Client(base_url=self._running.url, timeout=60) as http:
            body = {"model": self._model, "messages": [{"role": "user", "content": PROMPT}], "stream": stream}
            while not self._stop.is_set():
                try:
                    response = http.post("/v1/chat/completions", json=body)
                    if response.status_code != 200:
                        self.failures.append(response.text)
                    elif stream and "failed in the middle of the answer" in response.text.split("data: ")[-1]:
                        self.interrupted += 1
                    elif stream:
                        parts = events(response)
                        [model] = {part["model"] for part in parts}
                        text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
                        self.answers.append((model, text))
                    else:
                        answer = response.json()
                        self.answers.append((answer["model"], answer["choices"][0]["message"]["content"]))
                except Exception as error:
                    self.failures.append(repr(error))

    @property
    def texts(self) -> dict[str, set[str]]:
        """The distinct answers of each model."""
        found: dict[str, set[str]] = {}
        for model, text in self.answers:
            found.setdefault(model, set()).add(text)
        return found

    def wait_for(self, model: str) -> None:
        """Wait until this model answers."""
        # Answers that were started before the last change may come from this model too, so they do not count.
        wait_until(lambda: serves(self._running, self._model.partition("@")[0]) == model)
        start = len(self.answers)
        wait_until(lambda: any(name == model for name, _ in self.answers[start:]) or self.failures)
        assert not self.failures, self.failures[:3]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"


@contextmanager
def served(loop: str, **serving_settings):
    before = engines()
    with serving(make_loop(loop, serving=serving_settings)) as running:
        yield running, before
    wait_until(lambda: engines() <= before)


def serves(running: Running, loop: str) -> str:
    return running.health()["loops"][loop]["serving"]


def test_no_request_fails_while_the_champion_changes(ggufs):
    with served("moving") as (running, before):
        with Load(running, "moving") as load:
            load.wait_for("moving@base")
            for kind in ("Q8_0", "Q6_K", "Q4_K_M"):
                load.wait_for(promote(ggufs[kind], "moving").name)
            champion.switch(connect(), "moving", "v1.0.0", "tests", "back to the first")
            load.wait_for("moving@v1.0.0")
            champion.rollback(connect(), "moving", "tests", "and forth")
            load.wait_for("moving@v1.2.0")
            champion.switch(connect(), "moving", "base", "tests", "all the way")
            load.wait_for("moving@base")
        assert load.failures == []
        assert len(load.answers) > 50
        assert set(load.texts) == {"moving@base", "moving@v1.0.0", "moving@v1.1.0", "moving@v1.2.0"}
        wait_until(lambda: len(engines() - before) == 1)
        assert running.metric("finetune_swaps_total", loop="moving", result="done") == 6
        assert running.metric("finetune_in_flight", loop="moving") == 0


def test_adapters_are_swapped_in_one_process(ggufs, adapters):
    with served("pairs") as (running, before):
        one = promote(ggufs["F16"], "pairs", adapters[0])
        wait_until(lambda: serves(running, "pairs") == one.name)
        [process] = engines() - before
        alone = {one.name: running.ask(model="pairs").json()["choices"][0]["message"]["content"]}
        two = promote(ggufs["F16"], "pairs", adapters[1])
        wait_until(lambda: serves(running, "pairs") == two.name)
        alone[two.name] = running.ask(model="pairs").json()["choices"][0]["message"]["content"]
        assert alone[one.name] != alone[two.name]
        with Load(running, "pairs") as load, Load(running, two.name) as by_name:
            for _ in range(2):
                champion.switch(connect(), "pairs", one.version, "tests", "to and fro")
                load.wait_for(one.name)
                champion.switch(connect(), "pairs", two.version, "tests", "to and fro")
                load.wait_for(two.name)
        assert load.failures == by_name.failures == []
        assert load.texts == {name: {text} for name, text in alone.items()}
        assert by_name.texts == {two.name: {alone[two.name]}}
        assert process in engines()


def test_a_champion_that_does_not_load_keeps_the_old_one_in_service(ggufs, tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(ggufs["Q6_K"].read_bytes()[:200_000])
    good = promote(ggufs["Q8_0"], "careful")
    with served("careful") as (running, before):
        assert running.health()["status"] == "ok"
        with Load(running, "careful") as load:
            load.wait_for(good.name)
            bad = promote(half, "careful")
            wait_until(lambda: running.health()["loops"]["careful"]["last_error"])
            health = running.health()
            assert health["status"] == "degraded"
            assert health["loops"]["careful"]["serving"] == good.name
            error = health["loops"]["careful"]["last_error"]
            assert f"{bad.name} does not load; {good.name} stays in service: llama.cpp cannot load" in error
            load.wait_for(good.name)
            assert running.metric("finetune_healthy", loop="careful") == 0
            reloaded = running.http.post("/admin/reload-model", json={})
            assert (reloaded.status_code, reloaded.json()["error"]["code"]) == (503, "unavailable")
            assert f"{bad.name} does not load; {good.name} stays" in reloaded.json()["error"]["message"]
            rolled_back = running.http.post("/admin/rollback", json={"reason": "it does not load"}).json()
            assert rolled_back == {"loop": "careful", "serving": good.name, "last_error": None}
            load.wait_for(good.name)
        assert load.failures == []
        assert set(load.texts) == {good.name}
        assert running.health()["status"] == "ok"
        assert running.metric("finetune_swaps_total", loop="careful", result="failed") == 2
        assert len(engines() - before) == 1


def test_a_rollback_through_the_api_is_in_service_on_return(ggufs):
    first, second = promote(ggufs["Q8_0"], "back"), promote(ggufs["Q6_K"], "back")
    with served("back") as (running, _):
        assert running.ask(model="back").json()["model"] == second.name
        answer = running.http.post("/admin/rollback", json={"loop": "back", "reason": "worse"})
        assert (answer.status_code, answer.json()["serving"]) == (200, first.name)
        assert running.ask(model="back").json()["model"] == first.name
        assert running.metric("finetune_swaps_total", loop="back", result="done") == 1
        assert running.http.post("/admin/rollback", json={}).json()["serving"] == "back@base"
        nothing = running.http.post("/admin/rollback", json={})
        assert nothing.status_code == 409
        assert "there is nothing to roll back to" in nothing.json()["error"]["message"]


def test_a_reload_starts_a_new_process_of_the_same_model(ggufs):
    promote(ggufs["Q8_0"], "again")
    with served("again") as (running, before):
        old = engines() - before
        assert running.http.post("/admin/reload-model", json={"loop": "again"}).status_code == 200
        wait_until(lambda: len(engines() - before) == 1)
        assert old.isdisjoint(engines())
        assert running.ask(model="again").json()["model"] == "again@v1.0.0"


def test_the_fallback_answers_until_a_killed_model_is_restarted(ggufs):
    name = promote(ggufs["Q8_0"], "killed").name
    with served("killed") as (running, before):
        with Load(running, "killed") as load:
            load.wait_for(name)
            for _ in range(2):
                wait_until(lambda: len(engines() - before) == 1)
                [process] = engines() - before
                os.kill(process, signal.SIGKILL)
                wait_until(lambda process=process: process not in engines())
                load.wait_for(name)
        models = Counter(model for model, _ in load.answers)
        assert set(models) <= {name, "killed@base"}
        assert load.failures == []
        assert load.interrupted <= 2 * 4  # streams that had started; they end with an error and are not recorded
        wait_until(lambda: running.health()["status"] == "ok")
        wait_until(lambda: len(engines() - before) == 1)  # the fallback is drained too


def test_a_request_to_a_drained_fallback_goes_to_the_champion(ggufs, monkeypatch):
    name, found = promote(ggufs["Q8_0"], "raced").name, []
    real = loop_server.LoopServer._fallback_model

    async def as_late_as_can_be(self, problem):
        found.append(await real(self, problem))
        await asyncio.to_thread(wait_until, lambda: not found[-1].alive)
        return found[-1]

    monkeypatch.setattr(loop_server.LoopServer, "_fallback_model", as_late_as_can_be)
    with served("raced") as (running, before):
        wait_until(lambda: serves(running, "raced") == name)
        [process] = engines() - before
        os.kill(process, signal.SIGKILL)
        answer = running.ask(model="raced")
        assert (answer.status_code, answer.json().get("model")) == (200, name)
        assert [one.name for one in found] == ["raced@base"]


def test_a_killed_base_model_is_not_its_own_fallback(own_home):
    with served("base_only") as (running, before):
        [process] = engines() - before
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: process not in engines())
        answers = []
        wait_until(lambda: answers.append(running.ask(model="base_only")) or answers[-1].status_code == 200)
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


def test_a_stuck_model_is_replaced_and_its_request_refused(ggufs):
    name = promote(ggufs["Q8_0"], "stuck").name
    schema = {"title": "endless list", "type": "array", "items": {"type": "integer"}, "minItems": 150}
    form = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    with served("stuck", stuck_seconds=2) as (running, before), ThreadPoolExecutor(2) as clients:
        assert running.ask(model="stuck").json()["model"] == name
        [process] = engines() - before
        os.kill(process, signal.SIGSTOP)
        asked = clients.submit(running.ask, model="stuck", response_format=form)
        other = clients.submit(Running(running.url).ask, model="stuck")
        reports = []
        wait_until(lambda: reports.append(running.health()) or reports[-1]["status"] != "ok")
        assert reports[-1]["status"] in {"degraded", "unavailable"}  # the latter until the fallback is loaded
        assert "no progress for 2 s" in reports[-1]["loops"]["stuck"]["last_error"]
        refused = asked.result(60)
        assert refused.status_code == 400
        assert "'endless list'" in refused.json()["error"]["message"] and "no progress" in refused.text
        assert other.result(60).json()["model"] in {name, "stuck@base"}  # retried with the fallback
        wait_until(lambda: running.health()["status"] == "ok")
        assert process not in engines()
        assert running.ask(model="stuck").json()["model"] == name


def test_a_model_that_crashes_repeatedly_is_not_restarted(ggufs):
    name = promote(ggufs["Q8_0"], "brittle").name
    with served("brittle") as (running, before):
        base = set()
        for _ in range(3):
            wait_until(lambda: serves(running, "brittle") == name)
            for process in engines() - before - base:
                os.kill(process, signal.SIGKILL)
            wait_until(lambda: running.ask(model="brittle").json().get("model") == "brittle@base")
        wait_until(
            lambda: "crashed 3 times within a minute" in (running.health()["loops"]["brittle"]["last_error"] or "")
        )
        assert running.health()["status"] == "degraded"
        assert running.ask(model="brittle").json()["model"] == "brittle@base"


def test_a_named_version_is_loaded_once_and_the_least_recently_used_drained(ggufs):
    for kind in ("F16", "Q8_0", "Q6_K", "Q4_K_M"):
        promote(ggufs[kind], "many")
    with served("many") as (running, before):
        for version in ("v1.0.0", "v1.1.0", "v1.2.0", "v1.2.0"):
            assert running.ask(model=f"many@{version}").json()["model"] == f"many@{version}"
        wait_until(lambda: len(engines() - before) == 3)  # the champion and two versions
        assert running.ask(model="many@v1.0.0").json()["model"] == "many@v1.0.0"


def test_concurrent_changes_load_the_champion_once(ggufs):
    promote(ggufs["Q8_0"], "twice")
    with served("twice") as (running, _):
        promote(ggufs["Q6_K"], "twice")
        threads = [threading.Thread(target=_follow, args=(running,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert serves(running, "twice") == "twice@v1.1.0"
        assert running.metric("finetune_swaps_total", loop="twice", result="done") == 1


def _follow(running: Running) -> None:
    import asyncio

    server = running.gateway.servers["twice"]
    loop = running.gateway._refreshing[0].get_loop()
    pointer = champion.champion(connect(), "twice").id
    asyncio.run_coroutine_threadsafe(server.follow(pointer), loop).result(60)


def test_loading_continues_when_the_client_disconnects(ggufs, monkeypatch):
    promote(ggufs["Q8_0"], "patient")
    promote(ggufs["Q6_K"], "patient")
    with served("patient") as (running, _):
        opened = []

        gone = threading.Event()

        def slow(spec):
            gone.wait(60)
            opened.append(Engine(spec))
            return opened[-1]

        monkeypatch.setattr(loop_server, "Engine", slow)
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                body = {"model": "patient@v1.0.0", "messages": [{"role": "user", "content": PROMPT}]}
                running.http.post("/v1/chat/completions", json=body, timeout=0.2)
        gone.set()
        assert running.ask(model="patient@v1.0.0").json()["model"] == "patient@v1.0.0"
        assert len(opened) == 1
    wait_until(lambda: not opened[0].alive)


def test_a_request_does_not_wait_longer_than_load_seconds_for_its_model(ggufs, monkeypatch):
    promote(ggufs["Q8_0"], "slow_load")
    promote(ggufs["Q6_K"], "slow_load")
    with served("slow_load") as (running, _):
        release = threading.Event()

        def slow(spec):
            release.wait(60)
            return Engine(spec)

        monkeypatch.setattr(loop_server, "Engine", slow)
        monkeypatch.setattr(loop_server, "LOAD_SECONDS", 0.2)
        refused = running.ask(model="slow_load@v1.0.0")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert "is still loading the model for this request" in refused.json()["error"]["message"]
        release.set()
        wait_until(lambda: running.ask(model="slow_load@v1.0.0").status_code == 200)


def test_without_versions_naming_one_is_refused(ggufs):
    promote(ggufs["Q8_0"], "closed")
    with serving(make_loop("closed", serving={"versions": 0})) as running:
        refused = running.ask(model="closed@base")
        assert (refused.status_code, "serving.versions is 0" in refused.text) == (503, True)


def test_a_loop_that_loads_a_model_does_not_delay_others(ggufs, monkeypatch):
    promote(ggufs["Q8_0"], "heavy")
    promote(ggufs["Q8_0"], "light")
    with serving(make_loop("heavy"), make_loop("light")) as running:
        loading, release = threading.Event(), threading.Event()

        def open_engine(spec):
            if "heavy" in str(spec.gguf):
                loading.set()
                release.wait(60)
            return Engine(spec)

        monkeypatch.setattr(loop_server, "Engine", open_engine)
        promote(ggufs["Q6_K"], "heavy")
        assert loading.wait(60)
        promote(ggufs["Q6_K"], "light")
        wait_until(lambda: serves(running, "light") == "light@v1.1.0")
        assert serves(running, "heavy") == "heavy@v1.0.0"
        release.set()
        wait_until(lambda: serves(running, "heavy") == "heavy@v1.1.0")


def test_the_queue_is_bounded_during_an_adapter_swap(ggufs, adapters):
    promote(ggufs["F16"], "gated", adapter=adapters[0])
    with serving(make_loop("gated", serving={"parallel": 1, "queue": 1})) as running:
        server = running.gateway.servers["gated"]
        loop = running.gateway._refreshing[0].get_loop()
        loop.call_soon_threadsafe(server._no_swap.clear)  # as during a swap
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(running.ask, model="gated") for _ in range(6)]
            wait_until(lambda: sum(one.done() for one in asked) == 4)
            loop.call_soon_threadsafe(server._no_swap.set)
            answers = [one.result() for one in asked]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
        assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"1"}
