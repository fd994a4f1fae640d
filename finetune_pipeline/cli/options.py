"""Options shared by several commands."""

import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import click
from pydantic import BaseModel

from finetune_pipeline.settings import LoopSettings, SettingsError, load_loop, the_loop


def _chosen_loop(context: click.Context, _parameter: click.Parameter, name: str | None) -> LoopSettings:
    """Return the loop of --loop, or that of the model version or interaction which the command names."""
    interaction = context.params.get("interaction")
    named = [context.params.get(parameter) or "" for parameter in ("version", "first", "second")]
    version = next((text for text in named if "@" in text and "/" not in text), "")  # not a URL or a path
    of_version = version.partition("@")[0]
    if of_version and name and name != of_version:
        raise SettingsError(f"{version} is a model of {of_version}, and --loop is {name}; leave out --loop")
    if of_version:
        return load_loop(of_version)
    if name is None and interaction:
        from finetune_pipeline.database import connect
        from finetune_pipeline.feedback.store import find_interaction

        with suppress(ValueError), connect().read() as connection:  # it may be a prompt
            if found := find_interaction(connection, UUID(interaction)):
                return load_loop(found.interaction.loop)
    return the_loop(name)


loop_option = click.option(
    "--loop",
    callback=_chosen_loop,
    metavar="NAME",
    help="Name of the loop; default: FINETUNE_LOOP, or the only one.",
)
"""Passed to the command as LoopSettings.

An argument `version`, `first`, `second` or `interaction` decides the loop too; it needs `is_eager=True`, to be
parsed first.
"""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
"""Passed to the command as `as_json`."""


def end_of(until: datetime | None) -> datetime | None:
    """Return the time before which something is meant to be: a day is meant with all its hours."""
    is_day = until is not None and until == until.replace(hour=0, minute=0, second=0)
    return until + timedelta(days=1) if until is not None and is_day else until


def print_json(value: object) -> None:
    """Print a value as JSON; times are in UTC, paths are absolute."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_json_value))


def _json_value(value: object) -> object:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()  # SQLite returns UTC without a zone
    if isinstance(value, Path | UUID):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return vars(value)


PORTS = click.IntRange(1, 65_535)
"""The type of an option that names a port."""


def bind(host: str, port: int, options: str) -> socket.socket:
    """Return a socket that is bound to an address.

    Args:
        options: the options that choose another address, for the message.

    Raises:
        SettingsError: another program uses the port, or the address is not one of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"{host}, port {port}, cannot be served ({error.strerror or error}). End the program that uses it, or "
            f"choose another with {options}."
        ) from error
    return bound


UNLIMITED = 10_000
"""Columns of a table whose cells are copied into other commands, so that none is cut or wrapped."""

DAY = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])
"""A day or a time, in UTC."""

LISTED = 10
"""Lines of a kind that a command lists; it counts the others."""


def echo_some(lines: Sequence[str], count: int) -> None:
    """Print the first of `count` lines to stderr, and how many more there are."""
    for line in lines:
        click.echo(f"  {line}", err=True)
    if count > len(lines):
        click.echo(f"  and {count - len(lines):,} more", err=True)


_WIDTH = 100


def one_line(text: str) -> str:
    """Return a text in one line, cut to 100 characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _WIDTH else joined[: _WIDTH - 3] + "..."
