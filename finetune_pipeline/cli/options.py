"""Options shared by several commands."""

import getpass
from collections.abc import Sequence

import click

from finetune_pipeline.settings import LoopSettings, SettingsError, load_loop, load_loops, loop_folders


def the_loop(name: str | None) -> LoopSettings:
    """Return the loop of this name; without a name, the only loop.

    Raises:
        SettingsError: there is no such loop, or no name was given and not exactly one loop exists.
    """
    if name is not None:
        return load_loop(name)
    loops = load_loops()
    if not loops:
        raise SettingsError(
            f"no loop is declared under {' or '.join(map(str, loop_folders()))}; "
            "docs/how-to/declare-a-loop.md shows how to write one"
        )
    if len(loops) != 1:
        raise SettingsError(f"several loops are declared; choose one with --loop: {', '.join(loops)}")
    return next(iter(loops.values()))


loop_option = click.option(
    "--loop",
    callback=lambda _context, _parameter, name: the_loop(name),
    metavar="NAME",
    help="Name of the loop; optional while only one is declared.",
)
"""Passed to the command as LoopSettings."""


LISTED = 10
"""Lines of a kind that a command lists; it counts the others."""


def echo_some(lines: Sequence[str], count: int) -> None:
    """Print the first of `count` lines to stderr, and how many more there are."""
    for line in lines:
        click.echo(f"  {line}", err=True)
    if count > len(lines):
        click.echo(f"  and {count - len(lines):,} more", err=True)


def actor() -> str:
    """Return the name of the operating system user, for the deployment history."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
