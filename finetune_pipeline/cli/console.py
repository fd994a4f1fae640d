"""`finetune console`: the loop in a browser."""

import click

from finetune_pipeline.cli.options import PORTS, bind

CONSOLE_PORT = 8501


@click.command(short_help="Open the loop in a browser.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; other than loopback needs API keys."
)
@click.option("--port", type=PORTS, default=CONSOLE_PORT, show_default=True, help="Port to listen on.")
def console(host: str, port: int) -> None:
    """Serve the console: look at the loop, try and rate, review, and decide about models.

    Without API keys it serves this machine, and needs no login. Once a key exists, users log in with one: view reads,
    feedback rates and reviews too, and admin does everything.
    """
    from finetune_pipeline.console.server import serve
    from finetune_pipeline.database import connect
    from finetune_pipeline.hosts import is_loopback

    bind(host, port, "--port or --host").close()  # Streamlit would report a used port without a way out
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"starting the console: open http://{shown}:{port}; stop with Ctrl-C")
    serve(connect(), host, port, loopback=is_loopback(host))
