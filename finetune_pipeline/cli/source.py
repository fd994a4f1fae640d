"""`finetune source`: what the declared sources of a loop give."""

from collections import Counter
from collections.abc import Mapping

import click

from finetune_pipeline.cli.options import json_option, loop_option, print_json
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.wording import counted

_SHOWN_CHARACTERS = 600
_SHOWN_REASONS = 20


@click.group()
def source() -> None:
    """Look into the sources that a loop declares."""


@source.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(0), default=10, show_default=True, help="How many records to show.")
@json_option
@click.option(
    "--teacher", "ask_teacher", is_flag=True, help="Ask the source's teacher too; its replies are cached for the sync."
)
@loop_option
def preview(loop: LoopSettings, name: str, limit: int, as_json: bool, ask_teacher: bool) -> None:
    """Show what the source NAME would give, and what is left out and why.

    Reads the complete source and records nothing. Texts are redacted as in a dataset.
    """
    from finetune_pipeline.pipeline.source_preview import preview_source

    found = preview_source(loop, name, limit, ask_teacher=ask_teacher)
    if as_json:
        print_json(found.as_json())
        raise SystemExit(1 if found.error else 0)
    for number, record in enumerate(found.shown, start=1):
        about = ", ".join(filter(None, [record.kind, record.domain, f"reward {record.reward:g}"]))
        click.secho(f"{number}  {record.provenance}  ({about})", bold=True)
        if record.history:
            click.echo(f"    history     {counted(len(record.history), 'turn')}")
        _echo_text("prompt", record.prompt)
        _echo_text("completion", record.completion)
        if record.left_out:
            click.echo(f"    left out    {record.left_out}")
        click.echo()
    files = f" from {counted(found.files, 'file')}" if found.files else ""
    shown = f", {len(found.shown):,} shown" if len(found.shown) < found.records else ""
    click.echo(f"{found.source} ({found.kind}): {counted(found.records, 'record')}{files}{shown}")
    click.echo(f"{counted(found.examples, 'example')} for a dataset, before its quotas and near-duplicates")
    _echo_reasons("left out", found.left_out, {})
    _echo_reasons("skipped in the source", found.skipped, found.first_skipped)
    if found.teacher_not_asked:
        click.echo("the teacher was not asked; --teacher does that")
    if found.error:
        raise click.ClickException(found.error)


def _echo_text(label: str, text: str) -> None:
    """Print the start of a text under a label."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ... ({len(text):,} characters)"
    lines = shown.split("\n")
    click.echo("\n".join([f"    {label:<11} {lines[0]}", *(f"{'':16}{line}".rstrip() for line in lines[1:])]))


def _echo_reasons(label: str, reasons: Counter[str], first: Mapping[str, str]) -> None:
    """Print how many were left out, and the most frequent reasons with the places of the first ones."""
    if reasons:
        click.echo(f"{reasons.total():,} {label}:")
    for reason, count in reasons.most_common(_SHOWN_REASONS):
        place = f" ({'first in' if count > 1 else 'in'} {first[reason]})" if reason in first else ""
        click.echo(f"  {count:,}: {reason}{place}")
    if len(reasons) > _SHOWN_REASONS:
        click.echo(f"  and {len(reasons) - _SHOWN_REASONS:,} more reasons")
