"""`finetune alerts`: what people were told about a loop, and a test of the receivers."""

import sys

import click

from finetune_pipeline.cli.options import json_option, loop_option, print_json
from finetune_pipeline.settings import LoopSettings, SettingsError


@click.command()
@click.option("--test", is_flag=True, help="Send a test alert to the webhook and Slack now.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Number of alerts to show.")
@json_option
@loop_option
def alerts(loop: LoopSettings, test: bool, limit: int, as_json: bool) -> None:
    """Show the newest alerts, and who got them.

    With --test, a test alert is sent, and the exit code is 1 if a receiver did not get it.
    """
    from finetune_pipeline.alerts import Alert, deliver, list_alerts
    from finetune_pipeline.database import connect

    if test:
        deliveries = deliver(loop, Alert("failure", "test", f"{loop.name}: this is a test", "Nothing happened."))
        if not deliveries:
            raise SettingsError(
                f"loop {loop.name} names no receiver; set alerts.webhook_env or alerts.slack_env to the name of an "
                "environment variable with the URL"
            )
        if as_json:
            print_json(deliveries)
        else:
            for receiver, problem in deliveries.items():
                click.echo(f"{receiver}: {problem or 'sent'}")
        sys.exit(1 if any(deliveries.values()) else 0)
    found = list_alerts(connect(), loop.name, limit)
    if as_json:
        print_json([alert.model_dump() for alert in found])
        return
    if not found:
        click.echo(f"loop {loop.name} has sent no alerts; alerts are about {', '.join(loop.alerts.kinds) or 'nothing'}")
    for alert in found:
        click.echo(f"{alert.created_at:%Y-%m-%d %H:%M} UTC  {click.style(alert.kind, bold=True)}  {alert.title}")
        for line in [*alert.text.split("\n"), alert.link]:
            if line:
                click.echo(f"    {line}")
        if alert.deliveries is None:
            click.echo("    the process ended while sending it")
        for receiver, problem in (alert.deliveries or {}).items():
            click.echo(f"    {receiver}: {problem or 'sent'}")
