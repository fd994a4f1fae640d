"""Options shared by several commands."""

import getpass
import socket
from collections.abc import Sequence

import click

from finetune_pipeline.settings import LoopSettings, SettingsError, load_loop, load_loops, loop_folders, loops_dir


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
    outside = loops_dir()
    if outside is not None and not load_loops([outside]):
        raise SettingsError(
            f"FINETUNE_LOOPS_DIR is {outside}, which has no <loop>/defs.yaml. Write one, unset the variable, or choose "
            f"a loop with --loop: {', '.join(loops)}."
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
