"""`finetune dataset`: list and export curated datasets and show their cards."""

from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.options import DAY, UNLIMITED, end_of, json_option, loop_option, print_json
from finetune_pipeline.curation.dataset_files import DATASET_CARD, SPLITS
from finetune_pipeline.curation.export_formats import WRITERS, export_examples
from finetune_pipeline.pipeline.dataset_export import ExampleFilter, examples_of, find_dataset, list_datasets
from finetune_pipeline.settings import LoopSettings, with_loop
from finetune_pipeline.wording import counted

_version_option = click.option(
    "--version",
    metavar="VERSION",
    help="The dataset's version, as in Dagster's UI and in the name of its folder; default the newest.",
)


@click.group()
def dataset() -> None:
    """List and export curated datasets, or show the card of one."""


@dataset.command("list")
@json_option
@loop_option
def list_(loop: LoopSettings, as_json: bool) -> None:
    """List the datasets of a loop, newest first."""
    found = [one.manifest for one in list_datasets(loop)]
    if as_json:
        print_json([one.model_dump(exclude={"files", "near_benchmark", "conflicts"}) for one in found])
        return
    if not found:
        click.echo(f"loop {loop.name} has no dataset yet; `{with_loop('finetune run', loop)}` builds one")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("dataset", "created (UTC)", "train", "validation", "pairs", "undesirable", "sources"):
        table.add_column(heading, no_wrap=True)
    for one in found:
        counts = (one.train, one.validation, one.preference_pairs, one.undesirable)
        sources = ", ".join(f"{name} {count:,}" for name, count in one.sources.items())
        table.add_row(one.version, f"{one.created_at:%Y-%m-%d %H:%M}", *(f"{count:,}" for count in counts), sources)
    Console(width=UNLIMITED).print(table)


@dataset.command()
@click.option("--format", "format", type=click.Choice(list(WRITERS)), required=True, help="The format to write.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="The split to write.")
@click.option(
    "--out", "path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The file to write: a JSON array if its name ends in .json, else JSON lines. "
    "Default <loop>-<version>-<split>.<format>.jsonl in the current folder.",
)  # fmt: skip
@_version_option
@click.option("--author", metavar="NAME", multiple=True, help="Only of prompts that this user wrote; repeatable.")
@click.option("--domain", metavar="NAME", multiple=True, help="Only of this domain; repeatable.")
@click.option("--kind", metavar="NAME", multiple=True, help="Only of this kind of request; repeatable.")
@click.option("--source", metavar="NAME", multiple=True, help="Only of this source; repeatable.")
@click.option("--since", type=DAY, help="Only logged from this day or time (UTC) on.")
@click.option("--until", type=DAY, help="Only logged before this time, or until the end of this day.")
@click.option("--min-reward", type=click.FloatRange(-1, 1), metavar="R", help="Only with at least this reward.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@loop_option
def export(
    loop: LoopSettings,
    format: str,
    split: str,
    path: Path | None,
    version: str | None,
    since: datetime | None,
    until: datetime | None,
    force: bool,
    **wanted: Any,
) -> None:
    """Write a dataset's examples for other tools.

    `finetune ingest` reads each format too. An example is written if it passes all filters.
    """
    found = find_dataset(loop, version)
    examples = examples_of(found, split, ExampleFilter(since=since, until=end_of(until), **wanted))
    path = path or Path(f"{loop.name}-{found.manifest.version}-{split}.{format}.jsonl")
    system_prompt = str(found.manifest.settings.get("system_prompt", loop.system_prompt))
    try:
        written = export_examples(path, examples, format, system_prompt, force=force)
    except FileExistsError as error:
        raise click.ClickException(
            f"{path} exists already; name another file with --out, or overwrite it with --force"
        ) from error
    except OSError as error:
        raise click.ClickException(
            f"{path} could not be written ({error.strerror}); name a file in an existing folder, with enough space"
        ) from error
    click.echo(f"{counted(written, 'example')} of {loop.name} {found.manifest.version} ({split}) written to {path}")


@dataset.command()
@_version_option
@json_option
@loop_option
def card(loop: LoopSettings, version: str | None, as_json: bool) -> None:
    """Show a dataset's card.

    It has the sources, counts, filters, what was left out and why, and a sample. With --json, it is the dataset's
    manifest, without a sample.
    """
    found = find_dataset(loop, version)
    if as_json:
        print_json({**found.manifest.model_dump(), "folder": found.path})
        return
    click.echo((found.path / DATASET_CARD).read_text(encoding="utf-8"), nl=False)
