"""`finetune serve` and `finetune key`: the gateway for applications, and who may use it."""

import logging
import socket
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.settings import LoopSettings, SettingsError, load_loop, load_loops

if TYPE_CHECKING:
    from finetune_pipeline.database import Database

PORT = 8484


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but loopback needs API keys.")
@click.option("--port", type=click.IntRange(1, 65_535), default=PORT, show_default=True, help="Port.")
@click.option("--loop", "names", multiple=True, metavar="NAME", help="Which loops; default all.")
@click.option("--verbose", is_flag=True, help="Show the log of every part.")
def serve(host: str, port: int, names: tuple[str, ...], verbose: bool) -> None:
    """Answer applications: OpenAI's API over the promoted models, feedback, hot swap."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.serving.access import is_loopback
    from finetune_pipeline.serving.app import run
    from finetune_pipeline.serving.gateway import Gateway

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("finetune_pipeline.serving").setLevel(logging.INFO)
    loops = [load_loop(name) for name in names] or list(load_loops().values())
    if not loops:
        raise SettingsError("no loop is declared, so there is nothing to serve; the README shows how to write one")
    database = connect()
    _check_journal()
    gateway = Gateway(loops, database, loopback=is_loopback(host), tell=click.echo)
    if not gateway.loopback and not gateway.access.has_keys:
        raise SettingsError(
            f"{host} can be reached from other machines, and no API key exists; make one with "
            "`finetune key create NAME`, or serve 127.0.0.1"
        )
    with _bound(host, port) as address:
        _convert_bases(loops, database)
        shown = f"[{host}]" if address.family == socket.AF_INET6 and ":" in host else host
        click.echo(
            f"http://{shown}:{port}/v1 is the base address for OpenAI clients; /docs lists everything; end with ctrl-c"
        )
        run(gateway, address)


def _check_journal() -> None:
    from finetune_pipeline.feedback.write_ahead_log import journal_folder

    try:
        journal_folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=journal_folder()).close()
    except OSError as error:
        raise SettingsError(
            f"{journal_folder()}, where a gateway keeps what it has acknowledged, cannot be written ({error}); set "
            "FINETUNE_HOME to a folder that can be written"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    """A socket on this address: that another program has it is better heard before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"{host}, port {port}, cannot be served ({error.strerror or error}); end the program that has it, or "
            "choose another with --port or --host"
        ) from error
    return bound


def _convert_bases(loops: Sequence[LoopSettings], database: "Database") -> None:
    """Make the GGUF of a base model that will serve: minutes for a large one, which ctrl-c may end here."""
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.export.process import ExportError
    from finetune_pipeline.registry.champion import champion

    for loop in loops:
        if loop.serving.upstream is None and champion(database, loop.name) is None:
            try:
                base_gguf(loop, click.echo)
            except (ExportError, ArtifactError) as error:  # the other loops, or its fallback, can serve
                click.echo(f"{loop.name}: {error}", err=True)


@click.group()
def key() -> None:
    """Make, list and revoke API keys; once there is one, every request needs one."""


@key.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["infer", "feedback", "admin"]),
    default=("infer", "feedback"),
    show_default=True,
    help="What it may do; give it several times.",
)
def create(name: str, scopes: tuple[str, ...]) -> None:
    """Make a key called NAME and print its secret, this once."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.serving.access import SCOPES, create_key

    secret = create_key(connect(), name, [scope for scope in SCOPES if scope in scopes])
    click.echo(secret)
    click.echo(f"the key {name!r} may {', '.join(scopes)}; it is shown this once and kept as a hash only", err=True)


@key.command("list")
def list_() -> None:
    """List the keys, without their secrets."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.serving.access import list_keys

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "may", "made (UTC)", "revoked (UTC)", "id"):
        table.add_column(heading, overflow="fold")
    for one in list_keys(connect()):
        revoked = f"{one.revoked_at:%Y-%m-%d %H:%M}" if one.revoked_at else ""
        table.add_row(one.name, ", ".join(one.scopes), f"{one.created_at:%Y-%m-%d %H:%M}", revoked, one.id)
    Console().print(table)


@key.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Take the key called NAME (or with this id) out of use."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.serving.access import revoke_key

    count = revoke_key(connect(), name)
    click.echo(f"{count} revoked; a running gateway refuses it within a second")
