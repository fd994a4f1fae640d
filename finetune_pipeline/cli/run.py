"""`finetune run`, `finetune demo` and `finetune ui`: Dagster's own commands, with its home settled and less noise."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from datetime import datetime
from typing import IO

import click

from finetune_pipeline.artifacts import try_lock
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, home, load_loop

DEFINITIONS = "finetune_pipeline.definitions"
_TAIL = 15  # lines of Dagster's log that are shown where no step began, as when the definitions do not load
DEMO_LOOP = "aec_parser"
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"

# "2026-01-01 12:00:00 +0000 - dagster - INFO - __ASSET_JOB - <run id> - raw_logs - text", with a process id before the
# step where Dagster itself speaks.
_LINE = re.compile(r" - dagster - (?P<level>[A-Z]+) - \S+ - [0-9a-f-]{36} - (?:\d+ - )?(?P<rest>.*)$")
_EVENT = re.compile(r"^(?P<step>\w+) - (?P<event>[A-Z_]+) - (?P<text>.*)$")
_SAID = re.compile(r"^(?P<step>\w+) - (?P<text>.*)$")
# The last line of a traceback, where it is one of this project's own errors: it says what to do.
_REASON = re.compile(r"^\s*(?:finetune_pipeline\.[\w.]+|dagster\._core\.definitions\.events\.Failure): (?P<text>.+)$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@click.command()
@loop_option
@click.option("--verbose", is_flag=True, help="Show Dagster's whole log.")
def run(loop: LoopSettings, verbose: bool) -> None:
    """Run the whole loop once, as `dagster asset materialize` does; exits non-zero when the gate rejects.

    With gate.on_reject: keep_champion it exits with 0 for a rejected challenger too.
    """
    _check_training(loop)
    sys.exit(materialize(loop, verbose=verbose))


@click.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Run the default loop on the sample logs from nothing, and show what came out of it."""
    from finetune_pipeline.cli.ask import compare_with_base
    from finetune_pipeline.cli.summary import show_summary

    folder = home() / "demo"
    with try_lock(folder, "the demo"):
        click.echo(f"the demo runs in {folder}; an earlier demo there is replaced")
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["FINETUNE_HOME"] = str(folder)
        os.environ.pop("DAGSTER_HOME", None)
        loop = load_loop(DEMO_LOOP)
        started = time.monotonic()
        code = materialize(loop)
        click.echo(f"the loop took {time.monotonic() - started:.0f} s\n")
        show_summary(loop)
        if code == 0:
            compare_with_base(loop, DEMO_PROMPT)
            click.echo(f"\nlook at it in the browser:   make ui FINETUNE_HOME={folder}")
            click.echo(f"ask it, list it, take it back: export FINETUNE_HOME={folder}; .venv/bin/finetune ask ...")
    sys.exit(code)


@click.command()
def env() -> None:
    """Print what to export so that bare `dagster` commands use this home: eval "$(finetune env)"."""
    prepared = environment()
    for name in ("FINETUNE_HOME", "DAGSTER_HOME"):
        click.echo(f"export {name}={shlex.quote(prepared[name])}")


@click.command()
@click.option("--port", default=3000, show_default=True, help="Port on the loopback address.")
def ui(port: int) -> None:
    """Start Dagster's UI and daemon (sensors, schedules) on this project."""
    prepared = environment()
    click.echo(f"state: {home()}; open http://127.0.0.1:{port}, end with ctrl-c")
    command = ["dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
    os.chdir(PROJECT_ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # started in the background of a script, it would ignore ctrl-c
    os.execve(sys.executable, [sys.executable, "-m", "dagster", *command], prepared)


def _check_training(loop: LoopSettings) -> None:
    """Say now what would let the third asset fail; weights are downloaded only when nothing else stands against it."""
    from finetune_pipeline.export.base import CONFIG_FILES, resolve_base_model
    from finetune_pipeline.ray_session import check_installed
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.backends import choose
    from finetune_pipeline.training.base_model import check_base_model, check_trained_tokens
    from finetune_pipeline.training.distributed import split_batch
    from finetune_pipeline.training.preference import check_batch
    from finetune_pipeline.training.presets import settled
    from finetune_pipeline.training.trackers import check_trackers

    settings = loop.training
    config = resolve_base_model(loop.base_model, CONFIG_FILES)
    if settings.preset is not None:
        settings = settled(settings, architecture_of(loop.base_model))
    choose(settings).backend.validate(settings)
    check_trackers(settings)
    check_batch(settings, split_batch(settings, settings.num_processes).per_device_train_batch_size)
    check_trained_tokens(config, settings)
    if settings.compute == "ray":
        check_installed("training.compute")
    check_base_model(resolve_base_model(loop.base_model))


def materialize(loop: LoopSettings, *, verbose: bool = False) -> int:
    """Run the loop and show its progress; the whole log goes to a file.

    Returns:
        The exit code of `dagster asset materialize`: not 0 when a step failed or the gate rejected.
    """
    env = environment()
    select = "*" + "/".join([*loop.prefix, "promoted_model"])
    # Dagster's process ends with this one: nobody would see what an orphan of a killed command goes on to promote.
    tied = [sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())]
    command = [*tied, sys.executable, "-m", "dagster", "asset", "materialize", "--select", select, "-m", DEFINITIONS]
    log = home() / "logs" / f"{loop.name}-{datetime.now():%Y%m%d-%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command, env=env, cwd=PROJECT_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    unseen: list[str] = []
    try:
        with log.open("w", encoding="utf-8", buffering=1) as file:
            unseen = _follow(process.stdout, file, verbose)
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()
    if code:
        for line in unseen:
            click.echo(line)
        click.echo(f"not promoted (exit code {code}); Dagster's whole log is in {log}")
    return code


def _follow(lines: IO[str], log: IO[str], verbose: bool) -> list[str]:
    """Show what a person wants to see; where that was nothing at all, the last lines are given back."""
    started, last = time.monotonic(), None
    tail: deque[str] = deque(maxlen=_TAIL)
    for raw in lines:
        log.write(raw)
        line = _COLOUR.sub("", raw.rstrip())
        tail.append(line)
        text = line if verbose else summarise(line)
        if text and text != last:
            last = text
            click.echo(text if verbose else f"[{time.monotonic() - started:4.0f} s] {text}")
    return list(tail) if last is None else []


def summarise(line: str) -> str | None:
    """What of a line of Dagster's log a person wants to see: what steps say, how they end, and their checks."""
    match = _LINE.search(line)
    if match is None:
        reason = _REASON.match(line)
        return click.style(f"{'':<16} {reason['text']}", fg="red") if reason else None
    rest, level = match["rest"], match["level"]
    event = _EVENT.match(rest)
    if event is None:
        said = _SAID.match(rest)
        return f"{said['step']:<16} {said['text']}" if said and level in {"INFO", "WARNING", "ERROR"} else None
    step = f"{event['step']:<16}"
    match event["event"]:
        case "STEP_START":
            return f"{step} started"
        case "STEP_SUCCESS":
            return f"{step} {click.style('done', fg='green')}"
        case "STEP_FAILURE":
            return f"{step} {click.style('failed', fg='red')}: {event['text']}"
        case "ASSET_CHECK_EVALUATION":
            return f"{step} {event['text']}"
        case _:
            return None
