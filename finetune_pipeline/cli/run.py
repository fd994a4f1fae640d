"""`finetune run`, `check`, `demo`, `env` and `ui`: a run from the terminal, and Dagster's UI."""

import os
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from finetune_pipeline.artifacts import try_lock
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.options import PORTS, bind, loop_option
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, home, load_loop
from finetune_pipeline.wording import counted

DEMO_LOOP = "aec_parser"
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"


@click.command()
@loop_option
@click.option("--verbose", is_flag=True, help="Show Dagster's complete log.")
def run(loop: LoopSettings, verbose: bool) -> None:
    """Run the whole loop once, without a server.

    The run belongs to the loop's Dagster job, so the UI lists it there. Ctrl-C cancels it. The exit code is 1 if a step
    fails or the gate rejects the challenger; with gate.on_reject: keep_champion it is 0 for a rejected challenger.
    """
    click.echo(f"checking the files, settings and base model of loop {loop.name}")
    from finetune_pipeline.pipeline.check_loop import check_loop

    refuse(loop, check_loop(loop))
    sys.exit(run_job(loop, *new_run(loop), verbose=verbose))


@click.command()
@loop_option
def check(loop: LoopSettings) -> None:
    """Check the loop's settings, files and base model, and run nothing.

    Lists every problem that `finetune run` would stop at. The exit code is 1 if there is one. Weights of a base model
    on Hugging Face are not downloaded.
    """
    from finetune_pipeline.pipeline.check_loop import check_loop

    refuse(loop, check_loop(loop, download=False))
    click.echo(f"loop {loop.name}: no problems found")


def refuse(loop: LoopSettings, problems: Sequence[str]) -> None:
    """Raise an error that lists the problems of a loop, if there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise click.ClickException(f"Loop {loop.name} cannot run, {counted(len(problems), 'problem')}:{lines}")


@click.command()
def demo() -> None:
    """Run the default loop on the sample logs in a fresh home."""
    from finetune_pipeline.cli.ask import compare_with_base

    folder = home() / "demo"
    with try_lock(folder, "the demo"):
        click.echo(f"the demo runs in {folder} and replaces an earlier demo there")
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["FINETUNE_HOME"] = str(folder)
        os.environ.pop("DAGSTER_HOME", None)
        loop = load_loop(DEMO_LOOP)
        code = run_job(loop, *new_run(loop))
        if code == 0:
            compare_with_base(loop, DEMO_PROMPT)
            click.echo(f"\nopen it in the browser:    make ui FINETUNE_HOME={folder}")
            click.echo(f"before finetune commands:  export FINETUNE_HOME={folder} PATH=$PWD/.venv/bin:$PATH")
    sys.exit(code)


@click.command()
def env() -> None:
    """Print shell exports for `dagster`: eval "$(finetune env)".

    They make `dagster` use the same FINETUNE_HOME and DAGSTER_HOME as `finetune`.
    """
    prepared = environment()
    for name in ("FINETUNE_HOME", "DAGSTER_HOME"):
        click.echo(f"export {name}={shlex.quote(prepared[name])}")


@click.command()
@click.option("--port", type=PORTS, default=3000, show_default=True, help="Port on the loopback address.")
def ui(port: int) -> None:
    """Start Dagster's UI with its sensors and schedules."""
    prepared = environment()
    bind("127.0.0.1", port, "--port").close()  # Dagster would report a used port late, below what it logs
    click.echo(f"state: {home()}; open http://127.0.0.1:{port}, stop with Ctrl-C")
    command = ["dev", "-w", str(PROJECT_ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
    # In the project's folder, Dagster warns that it does not use the dagster.yaml there.
    os.chdir(prepared["DAGSTER_HOME"] if Path(prepared["DAGSTER_HOME"]).is_dir() else PROJECT_ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background process starts with SIGINT ignored
    quiet = ["-W", "ignore:Function `dev_command` is superseded"]  # by `dg dev`, which tells a user of this UI nothing
    os.execve(sys.executable, [sys.executable, *quiet, "-m", "dagster", *command], prepared)


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

    return run_loop(loop, run_id, log, click.echo, verbose=verbose)
