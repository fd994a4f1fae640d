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
    from finetune_pipeline.feedback.store import counters, unmatched
    from finetune_pipeline.pipeline.pending import count_new
    from finetune_pipeline.pipeline.review_queue import waiting as waiting_for_review
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.comparisons import judged_watermark
    from finetune_pipeline.sources.ingest_ledger import unread

    database = connect()
    with database.read() as connection:
        held = counters(connection, loop.name)
        waiting = unmatched(connection, loop.name, 1) if held.get("unmatched") else []
        files = unread(connection, loop.name, loop.log_folders)
    serving = champion(database, loop.name)
    click.echo(f"loop {loop.name}")
    click.echo(f"  store     {held.get('interactions', 0):,} interactions, {held.get('feedback', 0):,} feedback")
    if held.get("flagged"):
        click.echo(
            f"  flagged   {held['flagged']:,} answers so far that the model was not sure of; "
            "`finetune feedback flagged` lists what nobody has looked at"
        )
    if for_review := len(waiting_for_review(loop, database)):
        click.echo(f"  review    {for_review:,} examples wait for a person's eye; `finetune review` shows them")
    for oldest in waiting:
        click.echo(
            f"  waiting   {held['unmatched']:,} feedback whose interaction has not arrived, the oldest since "
            f"{oldest.created_at:%Y-%m-%d}; `finetune feedback stats` names them"
        )
    for folder in loop.log_folders[:-1]:
        if not folder.is_dir():
            click.echo(f"  missing   the source folder {folder} is not there; create it, or correct ingest.folders")
    if files:
        click.echo(f"  unread    {len(files)} event files; `finetune ingest` takes them in")
    click.echo(
        f"  trigger   {describe(count_new(loop, database, judged_watermark(database, loop.name)), loop.trigger)}"
    )
    click.echo(f"  serving   {serving.name if serving else 'the base model'}")
