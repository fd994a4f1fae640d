"""`finetune status`: what the sensor sees, and which model serves."""

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.settings import LoopSettings


@click.command()
@loop_option
def status(loop: LoopSettings) -> None:
    """Show how many new examples have arrived, and which model serves."""
    from finetune_pipeline.curation.trigger import describe
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.store import totals
    from finetune_pipeline.loop.counting import count_new
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.comparisons import judged_watermark
    from finetune_pipeline.sources.ledger import unread

    database = connect()
    with database.read() as connection:
        held = totals(connection, loop.name)
        files = unread(connection, loop.name, loop.log_folders)
    serving = champion(database, loop.name)
    click.echo(f"loop {loop.name}")
    click.echo(f"  store     {held.interactions} interactions, {held.feedback} feedback")
    if held.unmatched_feedback:
        click.echo(f"            {held.unmatched_feedback} feedback whose interaction has not arrived")
    if files:
        click.echo(f"  unread    {len(files)} event files; `finetune ingest` takes them in")
    click.echo(
        f"  trigger   {describe(count_new(loop, database, judged_watermark(database, loop.name)), loop.trigger)}"
    )
    click.echo(f"  serving   {serving.name if serving else 'the base model'}")
