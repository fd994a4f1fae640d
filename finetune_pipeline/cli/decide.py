"""`finetune model approve`, `reject`, `promote`, `archive` and `unarchive`: what a person decides about a model."""

import click

from finetune_pipeline.cli.deploy import follow_champion
from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.hosts import os_user
from finetune_pipeline.settings import LoopSettings

_reason = click.option("--reason", required=True, help="Recorded in the history, with your name.")


@click.command(short_help="Approve a challenger that the gate accepted.")
@click.argument("version", is_eager=True)
@_reason
@loop_option
def approve(version: str, reason: str, loop: LoopSettings) -> None:
    """Approve the challenger VERSION, which the gate accepted, and make it the champion.

    VERSION is the beginning of its SHA-256, as `finetune status` shows it. The approval is for the dataset, adapter,
    GGUF, report, settings and benchmark as they are: a change of one of them, or of the champion, makes it void. Then
    brings the deployment targets to the champion; one that fails is a warning.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.challengers import find_challenger
    from finetune_pipeline.pipeline.promote import approve_challenger

    challenger = find_challenger(connect(), version, loop.name)
    result = approve_challenger(loop, challenger, os_user(), reason, click.echo)
    click.echo(f"{result.model.name} is the champion now: {result.model.gguf_path}")
    follow_champion(loop)


@click.command(short_help="Reject a challenger that waits for approval.")
@click.argument("version", is_eager=True)
@_reason
@loop_option
def reject(version: str, reason: str, loop: LoopSettings) -> None:
    """Reject the challenger VERSION, which waits for approval; the champion stays."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.approval import reject_challenger
    from finetune_pipeline.pipeline.challengers import find_challenger

    database = connect()
    challenger = find_challenger(database, version, loop.name)
    reject_challenger(database, loop, challenger, os_user(), reason)
    click.echo(f"{challenger.name} is rejected; the champion stays")


@click.command(short_help="Make a challenger the champion.")
@click.argument("version", is_eager=True)
@click.option("--force", is_flag=True, help="Overrule the gate; failed blocking checks still stop it.")
@click.option("--reason", default="", help="Recorded in the history, with your name; needed with --force.")
@loop_option
def promote(version: str, force: bool, reason: str, loop: LoopSettings) -> None:
    """Make the challenger VERSION the champion, as the asset promoted_model does.

    VERSION is the beginning of its SHA-256. With --force it is promoted although the gate rejected it, the comparison
    was inconclusive, or nobody approved it. Then brings the deployment targets to the champion; one that fails is a
    warning.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.approval import name_of
    from finetune_pipeline.pipeline.challengers import find_challenger
    from finetune_pipeline.pipeline.promote import NotApproved, NotPromoted, force_challenger, promote_accepted

    challenger = find_challenger(connect(), version, loop.name)
    if force:
        model = force_challenger(loop, challenger, os_user(), reason, log=click.echo)
    else:
        result = promote_accepted(loop, challenger, os_user(), click.echo)
        again = f'`finetune model promote {challenger.name} --force --reason "..."` overrules that'
        if isinstance(result, NotPromoted):
            raise click.ClickException(f"{challenger.name}: {result.reason}; {again}")
        if isinstance(result, NotApproved):
            name = name_of(result.approval)
            raise click.ClickException(f'{name} needs an approval: `finetune model approve {name} --reason "..."`')
        model = result.model
    click.echo(f"{model.name} is the champion now: {model.gguf_path}")
    follow_champion(loop)


@click.command()
@click.argument("version", is_eager=True)
@_reason
@loop_option
def archive(version: str, reason: str, loop: LoopSettings) -> None:
    """Hide VERSION (v1.2.0) from lists; its files and history stay.

    The champion and the target of a rollback cannot be archived. A version that becomes champion again is shown again.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import archive as archive_version

    click.echo(f"{archive_version(connect(), loop.name, version, os_user(), reason).name} is archived")


@click.command()
@click.argument("version", is_eager=True)
@_reason
@loop_option
def unarchive(version: str, reason: str, loop: LoopSettings) -> None:
    """Show the archived VERSION in lists again."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import unarchive as unarchive_version

    click.echo(f"{unarchive_version(connect(), loop.name, version, os_user(), reason).name} is not archived any more")
