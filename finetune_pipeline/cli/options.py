"""The options that several commands share."""

import getpass
from collections.abc import Callable
from typing import Any, TypeVar

import click

from finetune_pipeline.settings import DEFS_FOLDER, LoopSettings, SettingsError, load_loop, load_loops

F = TypeVar("F", bound=Callable[..., Any])


def the_loop(name: str | None) -> LoopSettings:
    """The loop of this name; without one, the only loop that there is."""
    if name is not None:
        return load_loop(name)
    loops = load_loops()
    if not loops:
        raise SettingsError(f"no loop is declared under {DEFS_FOLDER}; the README shows how to write one")
    if len(loops) != 1:
        raise SettingsError(f"there are several loops; name one with --loop: {', '.join(loops)}")
    return next(iter(loops.values()))


def loop_option(command: F) -> F:
    """`--loop NAME`, given to the command as LoopSettings; not needed while there is one loop."""
    return click.option(
        "--loop",
        callback=lambda _context, _parameter, name: the_loop(name),
        metavar="NAME",
        help="Which loop; not needed while there is one.",
    )(command)


def actor() -> str:
    """Who is at the terminal, for the history."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
