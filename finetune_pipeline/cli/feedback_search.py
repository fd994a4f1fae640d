"""`finetune feedback list`, `search`, `show` and `tail`: look up interactions and their feedback."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

import click

from finetune_pipeline.cli.options import DAY, LISTED, end_of, json_option, loop_option, one_line, print_json
from finetune_pipeline.records import FeedbackKind
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.feedback.rewards import RewardFunction
    from finetune_pipeline.feedback.store import StoredInteraction

_POLL_SECONDS = 0.5


def filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the filters of `list` and `search` to a command."""
    for option in (
        click.option("--user", metavar="NAME", help="Who wrote the prompt or gave feedback on the answer."),
        click.option(
            "--label", type=click.Choice([*get_args(FeedbackKind), "unrated"]),
            help="Kind of a feedback on the answer; unrated: without feedback.",
        ),
        click.option("--since", type=DAY, help="Feedback given, or answers logged, from this day or time (UTC) on."),
        click.option("--until", type=DAY, help="Feedback given, or answers logged, before this time, or on this day."),
        click.option("--limit", type=click.IntRange(1), default=LISTED, show_default=True, help="Maximum number."),
        json_option,
        loop_option,
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("list")
@filter_options
def list_(loop: LoopSettings, limit: int, as_json: bool, **filters: Any) -> None:
    """List interactions with their feedback, the newest first.

    If several filters are given, user, label and time refer to the same feedback.
    """
    _print_found(loop, filters, limit, as_json)


@click.command()
@click.argument("text")
@filter_options
def search(text: str, loop: LoopSettings, limit: int, as_json: bool, **filters: Any) -> None:
    """List interactions that contain TEXT, the newest first.

    It is searched in prompts, answers and corrections.
    """
    _print_found(loop, {**filters, "text": text}, limit, as_json)


@click.command()
@click.argument("interaction", metavar="ID_OR_PROMPT", is_eager=True)
@json_option
@loop_option
def show(loop: LoopSettings, interaction: str, as_json: bool) -> None:
    """Show an interaction with its feedback.

    Also shows what it would train.

    ID_OR_PROMPT is the interaction's id, or a prompt that only one interaction has.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.feedback.store import find_interaction

    id = find_id(loop, interaction)
    with connect().read() as connection:
        found = find_interaction(connection, id)
    if found is None or found.interaction.loop != loop.name:
        raise click.ClickException(
            f"Loop {loop.name} has no interaction {id}. `finetune feedback list` shows the newest."
        )
    reward = reward_function(loop.feedback)
    if as_json:
        print_json(_as_json(found, reward))
    else:
        _print_interaction(found, reward)


@click.command()
@click.option("-n", "--lines", type=click.IntRange(0), default=LISTED, show_default=True, help="Number of last events.")
@click.option("-f", "--follow", is_flag=True, help="Wait for further events, until Ctrl-C.")
@loop_option
def tail(loop: LoopSettings, lines: int, follow: bool) -> None:
    """Write the last events as JSON lines, in the order of arrival.

    These are the raw interactions and feedback, with all personal data in them. A feedback has the reward that it
    counts for.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.feedback.search import events_after, offset_of_last

    database, reward = connect(), reward_function(loop.feedback)
    with database.read() as connection:
        offset = offset_of_last(connection, loop.name, lines)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background process starts with SIGINT ignored
    with suppress(KeyboardInterrupt):
        while True:
            with database.read() as connection:
                for number, event in events_after(connection, loop.name, offset, reward):
                    click.echo(event.model_dump_json(exclude_none=True))
                    offset = number
            if not follow:
                return
            time.sleep(_POLL_SECONDS)


def find_id(loop: LoopSettings, id_or_prompt: str) -> UUID:
    """Return the id that is given, or that of the only interaction with a prompt.

    Raises:
        ClickException: no interaction has the prompt, or several have.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.search import interactions_with_prompt

    with suppress(ValueError):
        return UUID(id_or_prompt)
    if not id_or_prompt.strip():
        raise click.UsageError("The id or prompt is empty")
    with connect().read() as connection:
        found = interactions_with_prompt(connection, loop.name, id_or_prompt)
    if len(found) == 1:
        return found[0].id
    shown = one_line(id_or_prompt)
    if not found:
        raise click.ClickException(
            f"{shown!r} is neither an id (a UUID) nor, in full or in part, the prompt of an interaction of loop "
            f"{loop.name}. `finetune feedback list` shows the newest."
        )
    more = f"\n  and {len(found) - LISTED:,} more" if len(found) > LISTED else ""
    candidates = "\n".join(f"  {one.id}  {one_line(one.prompt)}  ->  {one_line(one.output)}" for one in found[:LISTED])
    raise click.ClickException(
        f"{len(found)} interactions have different conversations or answers with the prompt {shown!r}. Name one by its "
        f"id, the newest first:\n{candidates}{more}"
    )


def _print_found(loop: LoopSettings, filters: dict[str, Any], limit: int, as_json: bool) -> None:
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.feedback.search import InteractionFilter
    from finetune_pipeline.feedback.search import search as search_store

    since, until = filters.pop("since"), end_of(filters.pop("until"))
    times = {"since": since and since.replace(tzinfo=UTC), "until": until and until.replace(tzinfo=UTC)}
    with connect().read() as connection:
        found = search_store(connection, loop.name, InteractionFilter(**filters, **times), limit)
    reward = reward_function(loop.feedback)
    if as_json:
        print_json([_as_json(one, reward) for one in found])
        return
    for one in found:
        value = "" if one.example is None else f", reward {one.example.reward:+.2f}"
        kinds = ", ".join(_label(feedback) for feedback in one.feedback) or "no feedback"
        who = f" by {one.interaction.user}" if one.interaction.user else ""
        click.echo(f"{one.interaction.id}  {_moment(one.interaction.created_at)}{who}: {kinds}{value}")
        click.echo(f"  prompt  {one_line(one.interaction.prompt)}\n  output  {one_line(one.interaction.output)}")
    if len(found) == limit:
        click.echo(f"the newest {limit:,}; --limit shows more", err=True)
    elif not found:
        click.echo(f"no interaction of loop {loop.name} matches", err=True)


def _print_interaction(found: "StoredInteraction", reward: "RewardFunction") -> None:
    interaction, example = found.interaction, found.example
    fields = interaction.model_dump(exclude={"event", "history", "prompt", "output", "created_at"}, exclude_none=True)
    click.echo(f"interaction {fields.pop('id')}")
    click.echo(f"  logged     {_moment(interaction.created_at)}")
    if (latency := fields.pop("latency_ms", None)) is not None:
        fields["latency"] = f"{latency:,.0f} ms"
    for name, value in fields.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
        click.echo(f"  {name:<10} {f'{value:.3g}' if isinstance(value, float) else _indented(text)}")
    for turn in interaction.history:
        click.echo(f"  {turn.role:<10} {_indented(turn.content)}")
    click.echo(f"  {'prompt':<10} {_indented(interaction.prompt)}\n  {'output':<10} {_indented(interaction.output)}")
    click.echo("feedback" if found.feedback else "no feedback")
    for one in found.feedback:
        click.echo(
            f"  {_moment(one.created_at)}  {_label(one)}, reward {reward(one, interaction):+.2f}"
            f"{f', by {one.user}' if one.user else ''}  ({one.id})"
        )
        if one.correction is not None:
            click.echo(f"    {_indented(one.correction, 4)}")
        if one.metadata is not None:
            click.echo(f"    metadata {json.dumps(one.metadata, ensure_ascii=False)}")
    if example is None:
        click.echo("trains nothing" + (": as much feedback for the answer as against it" if found.feedback else ""))
        return
    decided = f", review: {example.review}" if example.review else ""
    if not (found.feedback or decided):
        decided = ": nobody objected to the answer (feedback.implicit_acceptance)"
    click.echo(f"example with reward {example.reward:+.2f}{decided}\n  {'target':<10} {_indented(example.target)}")


def _as_json(found: "StoredInteraction", reward: "RewardFunction") -> dict[str, Any]:
    interaction, example = found.interaction, found.example
    return {
        "interaction": interaction.model_dump(mode="json", exclude={"event"}, exclude_none=True),
        "feedback": [
            {**one.model_dump(mode="json", exclude={"event"}, exclude_none=True), "reward": reward(one, interaction)}
            for one in found.feedback
        ],
        "reward": example.reward if example else None,
        "target": example.target if example else None,
        "review": example.review if example else None,
    }


def _label(feedback: Any) -> str:
    value = feedback.rating or (f"{feedback.score:g}" if feedback.score is not None else "")
    return f"{feedback.kind} {value}".strip()


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _indented(text: str, spaces: int = 13) -> str:
    return text.strip().replace("\n", "\n" + " " * spaces)


commands: Sequence[click.Command] = (list_, search, show, tail)
