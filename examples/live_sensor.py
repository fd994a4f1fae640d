"""Show the loop starting by itself: Dagster's daemon runs, event files arrive, the sensor starts runs.

    .venv/bin/python examples/live_sensor.py

The script works in a home of its own, `$FINETUNE_HOME/live`, which each call replaces. It starts `dagster dev`, turns
on the sensor of the default loop, and waits until the sample logs are ingested, a run has promoted the first champion,
and the sensor is quiet again. Then it drops a second file into the inbox and waits until the next run was judged and
the sensor is quiet. It prints every tick of the sensor, and the deployment history at the end. About 5 minutes.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster import DagsterInstance

from finetune_pipeline.settings import PROJECT_ROOT, home

LOOP = "aec_parser"
SENSOR = f"{LOOP}_new_examples"
MORE = PROJECT_ROOT / "data" / "samples" / "aec_parser_more" / "more.jsonl"
PORT = 3199
TIMEOUT_SECONDS = 420


def main() -> None:
    """Run the example; exit with 1 if something does not happen in time."""
    folder = home() / "live"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["FINETUNE_HOME"] = str(folder)
    os.environ.pop("DAGSTER_HOME", None)
    from finetune_pipeline.cli.dagster_home import environment

    os.environ.update(environment())
    shown: set[int] = set()
    with daemon(folder / "dagster-dev.log"), DagsterInstance.get() as instance:
        command(["sensor", "start", SENSOR, "-w", "workspace.yaml"])
        say("the sensor is on, the sample logs are in their folder")
        wait_for_quiet(instance, shown, judged=1)
        say("the first data was judged, and the next tick starts nothing")
        inbox = folder / "inbox" / LOOP
        shutil.copy(MORE, inbox / ".more.partial")
        (inbox / ".more.partial").rename(inbox / MORE.name)
        say(f"dropped {MORE.name} into {inbox}")
        wait_for_quiet(instance, shown, judged=2)
        say("the second data was judged, and the next tick starts nothing")
    subprocess.run([sys.executable, "-m", "finetune_pipeline.cli.main", "model", "history"], check=True)


@contextmanager
def daemon(log: Path) -> Iterator[None]:
    """Run `dagster dev` while the block runs."""
    # A script's background process and all its children ignore SIGINT unless it is reset.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(PORT)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=PROJECT_ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not serving():
            if time.monotonic() > deadline:
                sys.exit(f"Dagster's webserver did not start; see {log}")
            time.sleep(1)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def serving() -> bool:
    """Return whether the webserver answers, which it does once the code location is loaded."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/server_info", timeout=5):
            return True
    except OSError:
        return False


def command(arguments: list[str]) -> None:
    """Run one of Dagster's commands."""
    subprocess.run([sys.executable, "-m", "dagster", *arguments], cwd=PROJECT_ROOT, check=True)


def wait_for_quiet(instance: DagsterInstance, shown: set[int], judged: int) -> None:
    """Wait until `judged` runs of the whole loop have ended and the newest tick starts none; print each new tick."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        ended = sum(run.is_finished and "finetune/new_at_first_attempt" in run.tags for run in instance.get_runs())
        for state in instance.all_instigator_state():
            for tick in reversed(instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=20)):
                text = tick.skip_reason or f"starts {tick.run_keys}"
                if tick.tick_id not in shown and tick.status.value != "STARTED":
                    shown.add(tick.tick_id)
                    say(f"  tick: {text}")
            newest = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)
            if ended >= judged and newest and (newest[0].skip_reason or "").startswith("0 new"):
                return
        time.sleep(2)
    sys.exit("it did not happen in time; see dagster-dev.log in the home")


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
