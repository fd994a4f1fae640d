"""`finetune status`: the state of a loop."""

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.wording import counted


@click.command()
@loop_option
def status(loop: LoopSettings) -> None:
    """Show stored data, new examples and the champion."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.status import loop_status

    state = loop_status(loop, connect())
    click.echo(f"loop {loop.name}")
    click.echo(f"  store     {counted(state.interactions, 'interaction')}, {counted(state.feedback, 'feedback event')}")
    if state.flagged:
        click.echo(
            f"  flagged   {counted(state.flagged, 'answer')} with low confidence so far; `finetune feedback flagged` "
            "lists those that nobody has reviewed"
        )
    if state.to_review:
        click.echo(f"  review    {counted(state.to_review, 'example')} to review; `finetune review` shows them")
    if state.oldest_unmatched:
        click.echo(
            f"  unmatched {counted(state.unmatched, 'feedback event')} whose interaction has not arrived, the oldest "
            f"of {state.oldest_unmatched:%Y-%m-%d}; `finetune feedback stats` lists them"
        )
    for folder in state.missing_folders:
        click.echo(f"  missing   the log folder {folder} does not exist; create it, or correct ingest.folders")
    if state.unread_files:
        click.echo(f"  unread    {counted(state.unread_files, 'event file')} to ingest; run `finetune ingest`")
    click.echo(f"  trigger   {state.trigger}")
    click.echo(f"  champion  {state.champion or 'the base model'}")
