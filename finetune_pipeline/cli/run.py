"""`finetune run`, `check`, `demo`, `env` and `ui`: a run from the terminal, and Dagster's UI."""

import os
import shlex
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import click

from finetune_pipeline.artifacts import try_lock
from finetune_pipeline.cli.dagster_home import environment, hold_ui_lock
from finetune_pipeline.cli.options import PORTS, bind, json_option, loop_option, print_json
from finetune_pipeline.hosts import os_user
from finetune_pipeline.settings import (
    PROJECT_ROOT,
    InvalidSettings,
    LoopSettings,
    SettingsError,
    home,
    load_loop,
    the_loop,
)
from finetune_pipeline.wording import counted

UI_PORT = 3000
DEMO_LOOP = "aec_parser"
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"


@click.command()
@loop_option
@click.option("--verbose", is_flag=True, help="Show Dagster's complete log.")
@click.option(
    "--if-triggered", is_flag=True, help="Run only if the sensor would: enough new examples. For cron and CI."
)
def run(loop: LoopSettings, verbose: bool, if_triggered: bool) -> None:
    """Run the whole loop once, without a server.

    The run belongs to the loop's Dagster job, so the UI lists it there. Ctrl-C cancels it. The exit code is 1 if a step
    fails or the gate rejects the challenger; with gate.on_reject: keep_champion it is 0 for a rejected challenger.

    With --if-triggered, new event files are ingested first, and the exit code is 0 if no run is due.
    """
    if if_triggered:
        from finetune_pipeline.database import connect
        from finetune_pipeline.orchestration.automation import run_is_due
        from finetune_pipeline.pipeline.ingest import ingest

        ingest(loop, connect(), click.echo)
        due, numbers = run_is_due(loop, connect(), environment()["DAGSTER_HOME"])
        click.echo(numbers if due else f"no run is due: {numbers}")
        if not due:
            return
    click.echo(f"checking the files, settings and base model of loop {loop.name}")
    from finetune_pipeline.pipeline.check_loop import benchmark_note, check_loop

    refuse(loop, check_loop(loop))
    click.echo(benchmark_note(loop))
    sys.exit(run_job(loop, *new_run(loop), verbose=verbose))


@click.command()
@json_option
@click.option("--loop", "name", metavar="NAME", help="Name of the loop; default: FINETUNE_LOOP, or the only one.")
def check(name: str | None, as_json: bool) -> None:
    """Check the loop's settings, files and base model, and run nothing.

    Lists every problem that `finetune run` would stop at. The exit code is 1 if there is one. Otherwise it says which
    gains the benchmark can find, and how many questions it needs if it can decide nothing. Weights of a base model on
    Hugging Face are not downloaded. If a setting is invalid, the others are checked with its default.

    Warns of environment variables of alerts and deployment targets that are not set; they stop no run.
    """
    invalid = []
    try:
        loop = the_loop(name)
    except InvalidSettings as error:
        if error.valid is None or (name or os.environ.get("FINETUNE_LOOP") or error.valid.name) != error.valid.name:
            raise
        loop, invalid = error.valid, error.problems
        click.echo("some settings are invalid; the others are checked with the defaults of these", err=True)
    from finetune_pipeline.pipeline.check_loop import benchmark_note, check_loop, unset_variables

    warnings = unset_variables(loop)
    problems = [*invalid, *check_loop(loop, download=False)]
    try:
        environment()
    except SettingsError as error:  # the home cannot be written
        problems.append(str(error))
    notes = [] if problems else [benchmark_note(loop)]
    if as_json:
        print_json({"loop": loop.name, "problems": problems, "warnings": warnings, "notes": notes})
        sys.exit(1 if problems else 0)
    for warning in warnings:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)
    refuse(loop, problems)
    for line in (f"loop {loop.name}: no problems found", *notes):
        click.echo(line)


def refuse(loop: LoopSettings, problems: Sequence[str]) -> None:
    """Raise an error that lists the problems of a loop, if there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise click.ClickException(f"Loop {loop.name} cannot run, {counted(len(problems), 'problem')}:{lines}")


@click.command()
@click.option(
    "--base",
    type=click.Choice(["starter", "smollm2"]),
    default="starter",
    show_default=True,
    help="Base model: the starter model, or SmolLM2-135M-Instruct (extra smollm2).",
)
def demo(base: str) -> None:
    """Run the default loop on the sample logs.

    It runs in FINETUNE_HOME if that holds no data yet, so that the other commands show its results. Otherwise it runs
    in the folder `demo` in it, and replaces an earlier demo there.

    With `--base smollm2`, the same task is learned by a pretrained model that is given as a GGUF. Its loop is written
    to the folder `loops` of the home.
    """
    from finetune_pipeline.cli.ask import compare_with_base
    from finetune_pipeline.pipeline.demo_loop import NAME, smollm2_gguf, write_demo_loop

    gguf = smollm2_gguf() if base == "smollm2" else None
    own = home()
    empty = not os.environ.get("FINETUNE_DATABASE_URL") and not _in_use(own)
    folder = own if empty else own / "demo"
    with try_lock(own / "demo", "the demo"):
        if empty:
            click.echo(f"the demo runs in {folder}")
        else:
            click.echo(f"the demo runs in {folder} and replaces an earlier demo there, because {own} is in use")
            shutil.rmtree(folder, ignore_errors=True)
            os.environ["FINETUNE_HOME"] = str(folder)
            for name in ("DAGSTER_HOME", "FINETUNE_DATABASE_URL"):
                os.environ.pop(name, None)
        variables = {} if empty else {"FINETUNE_HOME": str(folder)}
        if gguf is not None:
            loops = str(write_demo_loop(folder, gguf))
            variables["FINETUNE_LOOPS_DIR"] = loops
            os.environ["FINETUNE_LOOPS_DIR"] = loops
        loop = load_loop(DEMO_LOOP if gguf is None else NAME)
        code = run_job(loop, *new_run(loop))
        if code == 0:
            compare_with_base(loop, DEMO_PROMPT)
            variable = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
            click.echo(f"\nopen it in the browser:    {variable}make ui")
            click.echo(f"before finetune commands:  export {variable}PATH=$PWD/.venv/bin:$PATH")
    sys.exit(code)


def _in_use(folder: Path) -> bool:
    """Return whether a home holds artifacts or interactions; what `status` and `doctor` leave there does not count."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.tables import interactions

    if any((folder / "artifacts").glob("*/*")):
        return True
    if not (folder / "finetune.db").exists():
        return False
    with connect().read() as connection:
        return connection.execute(interactions.select().limit(1)).first() is not None


@click.command()
def env() -> None:
    """Print shell exports for `dagster`: eval "$(finetune env)".

    They make `dagster` use the same FINETUNE_HOME and DAGSTER_HOME as `finetune`.
    """
    prepared = environment()
    for name in ("FINETUNE_HOME", "DAGSTER_HOME"):
        click.echo(f"export {name}={shlex.quote(prepared[name])}")


@click.command()
@click.option("--port", type=PORTS, default=UI_PORT, show_default=True, help="Port on the loopback address.")
def ui(port: int) -> None:
    """Start Dagster's UI with its sensors and schedules."""
    prepared = environment()
    bind("127.0.0.1", port, "--port").close()  # Dagster would report a used port late, below what it logs
    hold_ui_lock(Path(prepared["DAGSTER_HOME"]), f"http://127.0.0.1:{port}")
    click.echo(f"starting Dagster's UI of {home()}, which takes up to a minute; stop with Ctrl-C")
    command = ["dev", "-w", str(PROJECT_ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
    # In the project's folder, Dagster warns that it does not use the dagster.yaml there.
    os.chdir(prepared["DAGSTER_HOME"] if Path(prepared["DAGSTER_HOME"]).is_dir() else PROJECT_ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background process starts with SIGINT ignored
    _announce_ui(port)
    quiet = ["-W", "ignore:Function `dev_command` is superseded"]  # by `dg dev`, which tells a user of this UI nothing
    os.execve(sys.executable, [sys.executable, *quiet, "-m", "dagster", *command], prepared)


def _announce_ui(port: int) -> None:
    """Print the UI's address once it answers, by a process of its own, since this one becomes Dagster."""
    import psutil

    dagster = psutil.Process()
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork() == 0:  # a grandchild, because Dagster would not wait for a child of this process
        os.closerange(3, 1024)  # the UI's lock is among them
        with suppress(psutil.NoSuchProcess):  # Dagster has ended, and was waited for
            while dagster.status() != psutil.STATUS_ZOMBIE:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    click.echo(f"ready: open http://127.0.0.1:{port}; stop with Ctrl-C")
                    break
                time.sleep(0.5)
    os._exit(0)


def new_run(loop: LoopSettings) -> tuple[str, Path]:
    """Return the id of a new run and the path of its log, which is shown before the run's process starts."""
    run_id = str(uuid.uuid4())
    log = home() / "logs" / f"{loop.name}-{datetime.now():%Y%m%d-%H%M%S}-{run_id[:8]}.log"
    click.echo(f"complete log: {log}")
    return run_id, log


def run_job(loop: LoopSettings, run_id: str, log: Path, *, verbose: bool = False) -> int:
    """Run the loop's job in the home of this command; return the exit code."""
    os.environ.update(environment())
    from finetune_pipeline.orchestration.local_run import run_loop

    return run_loop(loop, run_id, log, click.echo, created_by=os_user(), verbose=verbose)
