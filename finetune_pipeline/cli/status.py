"""`finetune status`: the state of the loops."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune_pipeline.cli.deploy import problem_of
from finetune_pipeline.cli.options import json_option, print_json
from finetune_pipeline.curation.retrain_trigger import describe
from finetune_pipeline.pipeline.expected_errors import EXPECTED
from finetune_pipeline.settings import LoopSettings, database_url, home, load_loop, load_loops, loops_dir, with_loop
from finetune_pipeline.wording import counted

if TYPE_CHECKING:
    from finetune_pipeline.orchestration.automation import AutomationState
    from finetune_pipeline.pipeline.status import LoopStatus


@click.command()
@click.option("--loop", "name", metavar="NAME", help="Show this loop only; default: FINETUNE_LOOP, or all loops.")
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show stored data, new examples, automation and champion.

    For each loop: what a new run waits for, why new examples do not count, and whether something would start it.
    """
    from sqlalchemy.engine import make_url

    from finetune_pipeline.cli.dagster_home import environment
    from finetune_pipeline.database import connect
    from finetune_pipeline.orchestration.automation import automation_state
    from finetune_pipeline.pipeline.status import loop_status

    name = name or os.environ.get("FINETUNE_LOOP")
    outside = loops_dir()
    own = load_loops([outside]) if outside else {}
    loops = [load_loop(name)] if name else list({**own, **load_loops()}.values())  # the user's own first
    database = connect()
    # Dagster writes in its home also when it only reads; the store can be read without.
    folder = Path(os.environ.get("DAGSTER_HOME") or home() / "dagster")
    is_read_only = not os.access(folder if folder.exists() else home(), os.W_OK)
    dagster_home = None if is_read_only else environment()["DAGSTER_HOME"]
    found, broken = [], {}
    for loop in loops:
        try:
            automation = automation_state(loop, database, dagster_home) if dagster_home else None
            found.append((loop, loop_status(loop, database), automation))
        except EXPECTED as error:  # such as a damaged benchmark, which does not concern the other loops
            broken[loop.name] = str(error)
    url = make_url(database_url()).render_as_string(hide_password=True)
    if as_json:
        states = [
            {"loop": loop.name, **vars(state), **(vars(automation) if automation else {})}
            for loop, state, automation in found
        ]
        states += [{"loop": loop, "error": error} for loop, error in broken.items()]
        print_json({"home": home(), "database": url, "loops": states})
    else:
        click.echo(f"home {home()}" + (f"\ndatabase {url}" if os.environ.get("FINETUNE_DATABASE_URL") else ""))
        for loop, state, automation in found:
            click.echo(click.style(f"loop {loop.name}", bold=True))
            for label, text in _lines(loop, state, automation):
                click.echo(f"  {label:<9} {text}")
    if broken:
        lines = "".join(f"\n  {loop}: {error}" for loop, error in broken.items())
        raise click.ClickException(f"{counted(len(broken), 'loop')} cannot be read:{lines}")


def _lines(loop: LoopSettings, state: "LoopStatus", automation: "AutomationState | None") -> Iterator[tuple[str, str]]:
    yield "store", f"{counted(state.interactions, 'interaction')}, {counted(state.feedback, 'feedback event')}"
    if state.implicit:
        verb = "counts" if state.implicit == 1 else "count"
        yield "implicit", f"{counted(state.implicit, 'answer')} nobody objected to {verb} as accepted"
    if state.flagged:
        command = with_loop("finetune feedback flagged", loop)
        answers = counted(state.flagged, "answer")
        yield "flagged", f"{answers} with low confidence so far; `{command}` lists those that nobody has reviewed"
    if state.to_review:
        command = with_loop("finetune review", loop)
        optional = "" if loop.review.required else ", which is optional"
        yield "review", f"{counted(state.to_review, 'example')} to review{optional}; `{command}` shows them"
    if state.oldest_unmatched:
        yield (
            "unmatched",
            f"{counted(state.unmatched, 'feedback event')} whose interaction has not arrived, the oldest of "
            f"{state.oldest_unmatched:%Y-%m-%d}; `{with_loop('finetune feedback stats', loop)}` lists them",
        )
    for folder in state.missing_folders:
        yield "missing", f"the log folder {folder} does not exist; create it, or correct ingest.folders"
    if state.unread_files:
        command = with_loop("finetune ingest", loop)
        yield "unread", f"{counted(state.unread_files, 'event file')} to ingest; run `{command}`"
    for path, count in state.unread_rows.items():
        yield "unread", f"{counted(count, 'row')} in {path} {'is' if count == 1 else 'are'} read at the next run"
    numbers = describe(state.new_examples, loop.trigger, at_least=state.new_at_least)
    waits_for = automation.waits_for.removeprefix(numbers).removeprefix("; ") if automation else ""
    yield "trigger", f"{numbers}; {waits_for}" if waits_for else numbers
    for reason, count in sorted(state.not_counted.items(), key=lambda item: -item[1]):
        yield "", f"{count:,} more {'does' if count == 1 else 'do'} not count: {reason}"
    yield "runs", _automation(loop, automation)
    yield "champion", state.champion or "the base model"
    if state.approval:
        yield "approval", state.approval.summary
    if state.targets:
        others = [one for one in state.targets if one.state != "active"]
        active = f"{len(state.targets) - len(others)} of {counted(len(state.targets), 'target')} serve it"
        command = with_loop("finetune deploy status", loop)
        yield "deployed", f"{active}; {problem_of(others[0])}; `{command}` shows more" if others else active


def _automation(loop: LoopSettings, automation: "AutomationState | None") -> str:
    """Return what starts runs, or what to do so that something does."""
    if automation is None:
        return f"unknown: {home()} is read-only, and Dagster reads its history only where it can write"
    on = [name for name, switched_on in automation.switched_on.items() if switched_on]
    if not on:
        command = with_loop("finetune run", loop)
        return f"started by hand (`{command}`): sensor and schedules are off, see docs/how-to/automate.md"
    if not automation.daemon:
        return f"{', '.join(on)} switched on, but Dagster's daemon does not run: start `finetune ui`"
    return f"started by {', '.join(on)}"
