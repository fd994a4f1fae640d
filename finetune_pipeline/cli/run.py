"""`finetune run`, `finetune demo`, `finetune env` and `finetune ui`: a run from the terminal, and Dagster's UI."""

import os
import shlex
import shutil
import signal
import sys
import time

import click

from finetune_pipeline.artifacts import try_lock
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, home, load_loop

DEMO_LOOP = "aec_parser"
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"


@click.command()
@loop_option
@click.option("--verbose", is_flag=True, help="Show Dagster's complete log.")
def run(loop: LoopSettings, verbose: bool) -> None:
    """Run the whole loop once, without a server; exits non-zero if a step fails or the gate rejects the challenger.

    The run belongs to the loop's Dagster job, so the UI lists it there. Ctrl-C cancels it. With gate.on_reject:
    keep_champion the exit code is 0 for a rejected challenger too.
    """
    click.echo(f"checking the training settings and the base model of loop {loop.name}")
    from finetune_pipeline.pipeline.train import check_can_train

    check_can_train(loop)
    sys.exit(run_job(loop, verbose=verbose))


@click.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Run the default loop on the sample logs in a new home, and show the result."""
    from finetune_pipeline.cli.ask import compare_with_base
    from finetune_pipeline.cli.summary import show_summary

    folder = home() / "demo"
    with try_lock(folder, "the demo"):
        click.echo(f"the demo runs in {folder} and replaces an earlier demo there")
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["FINETUNE_HOME"] = str(folder)
        os.environ.pop("DAGSTER_HOME", None)
        loop = load_loop(DEMO_LOOP)
        started = time.monotonic()
        code = run_job(loop)
        click.echo(f"the loop took {time.monotonic() - started:.0f} s\n")
        show_summary(loop)
        if code == 0:
            compare_with_base(loop, DEMO_PROMPT)
            click.echo(f"\nopen it in the browser:  make ui FINETUNE_HOME={folder}")
            click.echo(f"ask it, roll it back:    export FINETUNE_HOME={folder}; .venv/bin/finetune ask ...")
    sys.exit(code)


@click.command()
def env() -> None:
    """Print the exports that make bare `dagster` commands use this home: eval "$(finetune env)"."""
    prepared = environment()
    for name in ("FINETUNE_HOME", "DAGSTER_HOME"):
        click.echo(f"export {name}={shlex.quote(prepared[name])}")


@click.command()
@click.option("--port", default=3000, show_default=True, help="Port on the loopback address.")
def ui(port: int) -> None:
    """Start Dagster's UI and daemon (sensors, schedules) for this project."""
    prepared = environment()
    click.echo(f"state: {home()}; open http://127.0.0.1:{port}, stop with Ctrl-C")
    command = ["dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
    os.chdir(PROJECT_ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background process starts with SIGINT ignored
    os.execve(sys.executable, [sys.executable, "-m", "dagster", *command], prepared)


def run_job(loop: LoopSettings, *, verbose: bool = False) -> int:
    """Run the loop's job in the home of this command; return the exit code."""
    os.environ.update(environment())
    from finetune_pipeline.orchestration.local_run import run_loop

    return run_loop(loop, click.echo, verbose=verbose)
