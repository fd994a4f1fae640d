"""`finetune deploy`: where the loop's deployment targets stand, and bring them to the champion now."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_pipeline.cli.options import json_option, loop_option, one_line, print_json
from finetune_pipeline.settings import LoopSettings, SettingsError, with_loop

if TYPE_CHECKING:
    from finetune_pipeline.deployment.target_state import TargetState

_NO_TARGETS = "loop {} declares no deployment targets; add some under deploy.targets, see docs/how-to/deploy.md"


@click.group()
def deploy() -> None:
    """Show the deployment targets, and bring them to the champion."""


@deploy.command()
@json_option
@loop_option
def status(loop: LoopSettings, as_json: bool) -> None:
    """Show what each target should serve, and what it serves.

    Reads the database only; a target is asked by `finetune deploy apply`, and once a minute by `finetune serve`.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.deploy import deployment_states

    states = deployment_states(loop, connect())
    if as_json:
        print_json(states)
    elif not states:
        click.echo(_NO_TARGETS.format(loop.name))
    else:
        _echo_states(states)


@deploy.command()
@click.argument("targets", nargs=-1)
@json_option
@loop_option
def apply(loop: LoopSettings, targets: Sequence[str], as_json: bool) -> None:
    """Bring TARGETS (default: all) to the champion now.

    Tries targets again whose next try is later, and rejected ones. The exit code is 1 if one of them does not serve the
    champion afterwards.
    """
    from finetune_pipeline.pipeline.deploy import reconcile

    known = [target.key for target in loop.deploy.followers]
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise SettingsError(
            f"loop {loop.name} has no target {unknown[0]!r}; there are: {', '.join(known) or 'none'} (deploy.targets)"
        )
    states = reconcile(loop, lambda line: click.echo(line, err=True), targets or None, force=True)
    if as_json:
        print_json(states)
    elif not states:
        click.echo(_NO_TARGETS.format(loop.name))
    else:
        _echo_states(states)
    raise SystemExit(0 if all(one.state == "active" for one in states) else 1)


def follow_champion(loop: LoopSettings) -> None:
    """Bring the loop's targets to a champion that was just changed; a target that fails is a warning."""
    from finetune_pipeline.pipeline.deploy import reconcile

    if not loop.deploy.followers:
        return
    for state in reconcile(loop, click.echo):
        if state.state != "active":
            again = with_loop("finetune deploy apply", loop)
            later = "" if state.state == "rejected" else "`finetune serve` or the next run tries it again; "
            click.secho(f"Warning: target {problem_of(state)}; {later}now: `{again}`", fg="yellow", err=True)


def problem_of(state: "TargetState") -> str:
    """Return what is wrong with a target that does not serve the champion, in one line."""
    serves = f", serves {state.observed}" if state.observed else ""
    return f"{state.summary}{serves}" + (f": {one_line(state.last_error)}" if state.last_error else "")


def _echo_states(states: Sequence["TargetState"]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "wanted", "observed", "state", "tries", "next try (UTC)", "last error"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "tries" else "left")
    for state in states:
        color = {"active": "green", "rejected": "red", "failed": "red"}.get(state.state, "yellow")
        table.add_row(
            state.target,
            state.wanted,
            state.observed or "",
            Text(state.state, style=color),
            str(state.tries),
            _time(state.next_try_at),
            Text(state.last_error),
        )
    Console().print(table)
    for state in states:
        for note in _notes(state):
            click.echo(f"{state.target}: {note}")


def _notes(state: "TargetState") -> Iterator[str]:
    facts = state.facts
    if facts.get("reads_control_tokens"):
        yield (
            "it reads control tokens of the chat template in messages: a user who types one can end his message and "
            "begin another. Remove them in the application, or let it ask this project's gateway"
        )
    if answers := facts.get("answers"):
        yield (
            f"{answers['same']} of {answers['total']} answers equal the judged model's, score {answers['score']:.1%}, "
            f"judged {answers['judged_score']:.1%}"
        )
    if drift := facts.get("drift"):
        yield f"somebody changed what it serves: at {drift['at']} it served {drift['found']}"
    if warning := facts.get("warning"):
        yield warning
    if command := facts.get("start_command"):
        yield f"start the server with: {command}"


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""
