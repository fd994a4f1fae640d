"""`finetune serve` and `finetune key`: run the gateway for applications, and manage its API keys."""

import logging
import socket
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.cli.options import PORTS, bind, json_option, print_json
from finetune_pipeline.settings import LoopSettings, SettingsError, load_loop, load_loops

if TYPE_CHECKING:
    from finetune_pipeline.database import Database

PORT = 8484
ALL_REVOKED = (
    "all API keys are revoked, and a gateway that once had keys does not answer without one, even on this machine. "
    "Create one with `finetune key create NAME`."
)


def _parse_origins(context: click.Context, option: click.Parameter, origins: tuple[str, ...]) -> tuple[str, ...]:
    from finetune_pipeline.serving.access import parse_origin

    try:
        return tuple(parse_origin(origin) for origin in origins)
    except ValueError as error:
        raise click.BadParameter(str(error), context, option) from error


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; other than loopback needs API keys."
)
@click.option("--port", type=PORTS, default=PORT, show_default=True, help="Port to listen on.")
@click.option("--loop", "names", multiple=True, metavar="NAME", help="Loop to serve, repeatable; default: all loops.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    callback=_parse_origins,
    help="Origin whose web pages may use the gateway, such as https://app.example, repeatable; those of this machine "
    "always may. `*`, with API keys only: all.",
)
@click.option("--verbose", is_flag=True, help="Show the log of all modules.")
def serve(host: str, port: int, names: tuple[str, ...], origins: tuple[str, ...], verbose: bool) -> None:
    """Serve the champions over an OpenAI-compatible API.

    Logs prompts and answers, accepts feedback, and swaps new champions in without a restart.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.write_ahead_log import write_ahead_log_folder
    from finetune_pipeline.hosts import is_loopback
    from finetune_pipeline.serving.access import ANY_ORIGIN
    from finetune_pipeline.serving.app import run
    from finetune_pipeline.serving.gateway import Gateway

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("finetune_pipeline.serving").setLevel(logging.INFO)
    loops = [load_loop(name) for name in names] or list(load_loops().values())
    if not loops:
        raise SettingsError(
            "No loop is declared, so there is nothing to serve; docs/how-to/declare-a-loop.md shows how to declare one."
        )
    database = connect()
    try:
        write_ahead_log_folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=write_ahead_log_folder()).close()
    except OSError as error:
        raise SettingsError(
            f"{write_ahead_log_folder()}, the folder of the write-ahead log, cannot be written ({error}). Set "
            "FINETUNE_HOME to a writable folder."
        ) from error
    gateway = Gateway(loops, database, loopback=is_loopback(host), allow_origins=origins, progress=click.echo)
    if not gateway.loopback and not gateway.access.has_keys:
        raise SettingsError(
            f"{host} can be reached from other machines, and no API key exists. Create one with "
            "`finetune key create NAME`, or serve 127.0.0.1."
        )
    if gateway.access.open and ANY_ORIGIN in origins:
        raise SettingsError(
            "--allow-origin '*' would let every web page that is open on this machine read what the gateway recorded, "
            "since no API key exists. Name the origins, or create a key with `finetune key create NAME`."
        )
    if gateway.loopback and not gateway.access.open and not gateway.access.has_keys:
        click.echo(f"every request will be refused: {ALL_REVOKED}", err=True)
    with bind(host, port, "--port or --host") as address:  # before the models, so that a used port is reported at once
        click.echo(f"starting the gateway for {', '.join(loop.name for loop in loops)}")
        _export_base_models(loops, database)
        shown = f"[{host}]" if address.family == socket.AF_INET6 and ":" in host else host
        ready = f"ready: OpenAI base URL http://{shown}:{port}/v1 (API reference: /docs); stop with Ctrl-C"
        run(gateway, address, lambda: click.echo(ready))


def _export_base_models(loops: Sequence[LoopSettings], database: "Database") -> None:
    """Export the base model of each loop without a champion, because it will serve; takes minutes for a large model."""
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.export.process import ExportError
    from finetune_pipeline.registry.champion import champion

    for loop in loops:
        local = loop.serving.upstream is None and loop.serving.target is None
        if local and champion(database, loop.name) is None:
            try:
                base_gguf(loop, lambda step, loop=loop: click.echo(f"{loop.name}: {step}"))  # type: ignore[misc]
            except (ExportError, ArtifactError) as error:  # the other loops, or its fallback, can serve
                click.echo(f"{loop.name}: {error}", err=True)


@click.group()
def key() -> None:
    """Create, list and revoke API keys of the gateway.

    Once a key exists, every request needs one.
    """


@key.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["infer", "feedback", "view", "admin"]),
    default=("infer", "feedback"),
    show_default=True,
    help="Scope of the key, repeatable; view is for the console alone.",
)
def create(name: str, scopes: tuple[str, ...]) -> None:
    """Create a key called NAME and print its secret.

    The secret is not stored. A key with a NAME that was used before continues that name's conversations.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.api_keys import SCOPES, create_key

    secret = create_key(connect(), name, [scope for scope in SCOPES if scope in scopes])
    click.echo(secret)
    click.echo(
        f"created key {name!r} with scopes {', '.join(scopes)}; only its hash is stored, so copy it now", err=True
    )


@key.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List all keys, without their secrets."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.api_keys import list_keys

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "scopes", "created (UTC)", "revoked (UTC)", "id"):
        table.add_column(heading, overflow="fold")
    keys = list_keys(connect())
    if as_json:
        print_json([key.model_dump(exclude={"secret_sha256"}) for key in keys])
        return
    if not keys:
        click.echo("no API key exists; `finetune key create NAME` creates one")
        return
    for key in keys:
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
        table.add_row(key.name, ", ".join(key.scopes), f"{key.created_at:%Y-%m-%d %H:%M}", revoked, key.id)
    Console().print(table)


@key.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Revoke the key with this NAME or id."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.database.api_keys import list_keys, revoke_key

    database = connect()
    count = revoke_key(database, name)
    click.echo(f"revoked {count}; a running gateway refuses it within a second")
    if all(key.revoked_at for key in list_keys(database)):
        click.echo(f"no key is left: {ALL_REVOKED}", err=True)
