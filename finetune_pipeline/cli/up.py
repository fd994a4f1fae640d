"""`finetune up`: Dagster's webserver and daemon, the gateway and the console together, until Ctrl-C."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import click
import httpx
import psutil

from finetune_pipeline.cli.console import CONSOLE_PORT
from finetune_pipeline.cli.dagster_home import environment, hold_ui_lock
from finetune_pipeline.cli.options import PORTS, bind
from finetune_pipeline.cli.run import UI_PORT
from finetune_pipeline.cli.serve import PORT
from finetune_pipeline.orchestrator import Orchestrator, OrchestratorError
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError
from finetune_pipeline.wording import first_line

_STOP_SECONDS = 30
"""How long a service may take to stop before it is killed. Dagster interrupts its runs meanwhile."""

_QUIET = "ignore:Parameter `execution_type` of function"
"""Dagster's warning about its own beta parameter, once for each process that loads the definitions."""

_CHECK_SECONDS = 5
_COLORS = ("cyan", "yellow", "green", "magenta")
_LAST_LINES = 5


@dataclass
class _Service:
    """One of the programs.

    Attributes:
        address: what a person opens; empty for a program without a page.
        problem: returns why it does not work; empty if it does.
        state: the last state that was printed.
        last: its last lines, for the message when it ends.
    """

    name: str
    command: list[str]
    address: str
    problem: Callable[[], str]
    state: str = "starting"
    process: "subprocess.Popen[str] | None" = None
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))


@click.command(short_help="Start Dagster, the gateway and the console together.")
@click.option("--ui-port", type=PORTS, default=UI_PORT, show_default=True, help="Port of Dagster's UI.")
@click.option("--gateway-port", type=PORTS, default=PORT, show_default=True, help="Port of the gateway.")
@click.option("--console-port", type=PORTS, default=CONSOLE_PORT, show_default=True, help="Port of the console.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the gateway and the console; other than loopback needs API keys.",
)
@click.option(
    "--ui-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of Dagster's UI. It has no login: whoever reaches it can start and cancel runs.",
)
@click.option("--no-console", is_flag=True, help="Leave out the console, which needs the extra `console`.")
def up(ui_port: int, gateway_port: int, console_port: int, host: str, ui_host: str, no_console: bool) -> None:
    """Start Dagster's UI and daemon, the gateway and the console, with one log.

    Ctrl-C stops them all. If one of them ends by itself, the others are stopped too and the exit code is 1, so that a
    service manager can start all of them again.
    """
    if not no_console and importlib.util.find_spec("streamlit") is None:
        from finetune_pipeline.console.server import INSTALL

        raise SettingsError(f"the console needs the extra `console`; install it: {INSTALL}. Or add --no-console.")
    prepared = environment()
    ports = {"--ui-port": (ui_host, ui_port), "--gateway-port": (host, gateway_port)}
    if not no_console:
        ports["--console-port"] = (host, console_port)
    for option, (address, port) in ports.items():
        if same := [other for other, (_, taken) in ports.items() if other != option and taken == port]:
            raise SettingsError(f"{option} and {same[0]} are both {port}; choose another port for one of them")
        bind(address, port, option).close()
    shown, asked = _in_url(host), _asked(host)
    ui = f"http://{_asked(ui_host)}:{ui_port}"
    hold_ui_lock(Path(prepared["DAGSTER_HOME"]), ui)
    finetune = [sys.executable, "-m", "finetune_pipeline.cli.main"]
    scripts, workspace = Path(sys.executable).parent, ["-w", str(PROJECT_ROOT / "workspace.yaml")]
    services = [
        _Service(
            "dagster",
            [str(scripts / "dagster-webserver"), "-h", ui_host, "-p", str(ui_port), *workspace],
            f"http://{_in_url(ui_host)}:{ui_port}",
            lambda: _http_problem(f"{ui}/server_info"),
        ),
        _Service(
            "daemon",
            [str(scripts / "dagster-daemon"), "run", "--log-level", "warning", *workspace],
            "",
            lambda: _daemon_problem(Orchestrator(ui, _CHECK_SECONDS)),
        ),
        _Service(
            "gateway",
            [*finetune, "serve", "--host", host, "--port", str(gateway_port)],
            f"http://{shown}:{gateway_port}/v1",
            lambda: _http_problem(f"http://{asked}:{gateway_port}/healthz"),
        ),
    ]
    if not no_console:
        services.append(
            _Service(
                "console",
                [*finetune, "console", "--host", host, "--port", str(console_port)],
                f"http://{shown}:{console_port}",
                lambda: _http_problem(f"http://{asked}:{console_port}/_stcore/health"),
            )
        )
    sys.exit(_run(services, prepared))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _asked(host: str) -> str:
    """Return where a program on this machine reaches one that listens on an address, as in a URL."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, _in_url(host))


def _run(services: list[_Service], env: dict[str, str]) -> int:
    """Run the services until a signal comes or one of them ends; return the exit code."""
    ended, group = None, _watched_group()
    _let_signals_stop()
    with suppress(KeyboardInterrupt):
        try:
            for service, color in zip(services, _COLORS, strict=False):
                _start(service, click.style(f"{service.name:<8}| ", fg=color), env, group)
            ended = _watch(services)
        finally:
            _stop(services, group)
    if ended is None:
        return 0
    assert ended.process
    click.echo(f"{ended.name} ended by itself with exit code {ended.process.returncode}; its last lines:", err=True)
    click.echo("\n".join(f"    {line}" for line in ended.last), err=True)
    return 1


def _let_signals_stop() -> None:
    """Let Ctrl-C, SIGTERM and a closed terminal stop the services, also in a script's background process."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)  # once is enough: the services are being stopped
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _watched_group() -> int:
    """Return the id of a new process group that is ended when this process ends, however it ends.

    Its first member, a copy of this process, holds the group open and waits for the end of a pipe whose other end only
    this process has. A parent-death signal would not be enough: Dagster's code servers wait for their runs.
    """
    waits, held = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        os.setpgid(0, 0)
        os.close(held)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.read(waits, 1)  # returns at the end of the pipe
        os.killpg(0, signal.SIGTERM)
        _wait_for(os.getpid(), [])
        os.killpg(0, signal.SIGKILL)
    with suppress(PermissionError):  # the watcher has done it
        os.setpgid(watcher, watcher)
    os.close(waits)
    return watcher


def _start(service: _Service, prefix: str, env: dict[str, str], group: int) -> None:
    """Start a service in a process group; its lines go to this process's output."""
    service.process = subprocess.Popen(
        service.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**env, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": _QUIET},
        # In the project's folder, Dagster warns that it does not use the dagster.yaml there.
        cwd=env["DAGSTER_HOME"] if Path(env["DAGSTER_HOME"]).is_dir() else PROJECT_ROOT,
        process_group=group,  # not this process's: Ctrl-C is for this one, which then stops them
    )

    def copy() -> None:
        assert service.process and service.process.stdout
        for line in service.process.stdout:
            service.last.append(line.rstrip())
            click.echo(prefix + line.rstrip())

    threading.Thread(target=copy, daemon=True).start()


def _watch(services: list[_Service]) -> _Service:
    """Print when a service works, and when it stops working; return the first one that ends."""
    started = time.monotonic()
    while True:
        for service in services:
            assert service.process
            if service.process.poll() is not None:
                return service
            problem = service.problem()
            state = "ready" if not problem else service.state if service.state == "starting" else problem
            if state != service.state:
                service.state = state
                click.echo(
                    f"{service.name}: {state}{f': {service.address}' if not problem and service.address else ''}"
                )
                if started and all(one.state == "ready" for one in services):
                    click.echo(
                        f"all services are ready after {time.monotonic() - started:.0f} s; stop them with Ctrl-C"
                    )
                    started = 0.0
        time.sleep(1 if started else _CHECK_SECONDS)


def _stop(services: list[_Service], group: int) -> None:
    """Stop the services and all that they started; kill what takes too long."""
    click.echo("stopping")
    os.killpg(group, signal.SIGTERM)
    started = [(service.name, service.process) for service in services if service.process]
    left = _wait_for(group, [process for _, process in started])
    if left:
        late = [name for name, process in started if process.poll() is None] or ["a process of Dagster"]
        click.echo(f"{', '.join(late)} did not stop within {_STOP_SECONDS} s and is killed", err=True)
    os.killpg(group, signal.SIGKILL)  # the watcher too
    os.waitpid(group, 0)
    for _, process in started:
        process.wait()
    click.echo("stopped")


def _wait_for(group: int, children: list["subprocess.Popen[str]"]) -> list[int]:
    """Wait until a process group has no member but its first; return those that are left at the time limit.

    Args:
        children: the members that are children of this process, which has to wait for them to let them go.
    """
    end = time.monotonic() + _STOP_SECONDS
    while True:
        for child in children:
            child.poll()
        members = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError):
                if pid != group and os.getpgid(pid) == group:
                    members.append(pid)
        if not members or time.monotonic() > end:
            return members
        time.sleep(0.2)


def _http_problem(url: str) -> str:
    """Return why a service does not answer at an address; empty if it does."""
    try:
        response = httpx.get(url, timeout=_CHECK_SECONDS)
    except httpx.HTTPError as error:
        return f"does not answer at {url} ({type(error).__name__})"
    return "" if response.is_success else f"answers {response.status_code} at {url}"


def _daemon_problem(dagster: Orchestrator) -> str:
    """Return why Dagster's daemon does not evaluate sensors and schedules; empty if it does."""
    try:
        alive = dagster.automation().daemon
    except OrchestratorError as error:
        return first_line(str(error))
    return "" if alive else "has no recent heartbeat"
