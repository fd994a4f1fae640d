"""`finetune up` with the real programs: they start and stop together, however it ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError
from finetune_pipeline_tests.waiting import wait_until

STARTED = "all services are ready"


def free_ports(count: int) -> list[int]:
    """Return ports that no program uses."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def of_home(home: Path) -> list[psutil.Process]:
    """Return the running processes whose FINETUNE_HOME is `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            running = process.status() != psutil.STATUS_ZOMBIE
            if running and process.pid != os.getpid() and process.environ().get("FINETUNE_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Started:
    """A started `finetune up`, its ports, and what it printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.home, self.log = folder / "state", folder / "log"
        self.ui, self.gateway, self.console = free_ports(3)
        ports = f"--ui-port {self.ui} --gateway-port {self.gateway} --console-port {self.console}".split()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_pipeline.cli.main", "up", *ports, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "FINETUNE_HOME": str(self.home), "DAGSTER_HOME": str(self.home / "dagster")},
                cwd=PROJECT_ROOT,
            )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        wait_until(
            lambda: STARTED in self.output() or self.process.poll() is not None, 600, lambda: f"ready\n{self.output()}"
        )
        assert STARTED in self.output()

    def launch_run(self) -> None:
        """Launch a run of the loop, and wait until one of its steps runs."""
        job = {
            "repositoryLocationName": "finetune_pipeline", "repositoryName": "__repository__",
            "pipelineName": "aec_parser_loop",
        }  # fmt: skip
        query = (
            "mutation ($job: JobOrPipelineSelector!) { launchRun(executionParams: {selector: $job}) { __typename } }"
        )
        answer = httpx.post(
            f"http://127.0.0.1:{self.ui}/graphql", json={"query": query, "variables": {"job": job}}, timeout=100
        )
        assert answer.json()["data"]["launchRun"]["__typename"] == "LaunchRunSuccess", answer.text
        wait_until(lambda: "STEP_START" in self.output(), what=lambda: f"a step runs\n{self.output()}")


@pytest.fixture
def starts(tmp_path) -> Iterator:
    started: list[Started] = []

    def start(*arguments: str) -> Started:
        started.append(Started(tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        for process in of_home(one.home):
            process.kill()
        one.process.kill()
        one.process.wait()


@pytest.mark.slow
def test_all_answer_and_ctrl_c_stops_all(starts):
    pytest.importorskip("streamlit", reason="the extra `console` is not installed")
    up = starts()
    up.wait_until_ready()
    for name, address in {
        "dagster": f"http://127.0.0.1:{up.ui}",
        "gateway": f"http://127.0.0.1:{up.gateway}/v1",
        "console": f"http://127.0.0.1:{up.console}",
    }.items():
        assert f"{name}: ready: {address}" in up.output().splitlines()
    assert "daemon: ready" in up.output().splitlines()
    assert httpx.get(f"http://127.0.0.1:{up.gateway}/v1/models", timeout=100).is_success
    assert httpx.get(f"http://127.0.0.1:{up.console}", timeout=100).is_success
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0, up.output()
    assert up.output().splitlines()[-1] == "stopped" and "killed" not in up.output()
    assert of_home(up.home) == []


@pytest.mark.slow
def test_a_kill_leaves_no_process_not_even_of_a_run(starts):
    up = starts("--no-console")
    up.wait_until_ready()
    up.launch_run()
    assert len(of_home(up.home)) > 4
    up.process.kill()
    wait_until(lambda: not of_home(up.home), 120, lambda: f"no process is left: {of_home(up.home)}")


@pytest.mark.slow
def test_if_one_ends_the_others_are_stopped_and_it_is_named(starts):
    up = starts("--no-console")
    up.wait_until_ready()
    (gateway,) = (one for one in psutil.Process(up.process.pid).children() if "serve" in one.cmdline())
    gateway.kill()
    assert up.process.wait(120) == 1, up.output()
    assert "gateway ended by itself with exit code -9; its last lines:" in up.output()
    assert of_home(up.home) == []


def test_a_used_port_is_refused_before_anything_starts(own_home):
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = str(other.getsockname()[1])
        with pytest.raises(SettingsError, match=rf"port {used}, cannot be served .* with --gateway-port"):
            CliRunner().invoke(finetune, ["up", "--gateway-port", used, "--no-console"], catch_exceptions=False)


def test_two_services_on_one_port_are_refused(own_home):
    port = str(free_ports(1)[0])
    with pytest.raises(SettingsError, match="--ui-port and --gateway-port are both"):
        CliRunner().invoke(finetune, ["up", "--ui-port", port, "--gateway-port", port], catch_exceptions=False)
