"""`finetune dataset`: export curated datasets and show their cards."""

from pathlib import Path

import click

from finetune_pipeline.artifacts import Artifact, ArtifactError, get_latest, read, stage_folder
from finetune_pipeline.cli.options import json_option, loop_option, print_json
from finetune_pipeline.curation.dataset_files import DATASET_CARD, SPLITS, read_examples
from finetune_pipeline.curation.export_formats import WRITERS, export_examples
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.settings import LoopSettings, with_loop
from finetune_pipeline.wording import counted

_version_option = click.option(
    "--version",
    metavar="VERSION",
    help="The dataset's version, as in Dagster's UI and in the name of its folder; default the newest.",
)


@click.group()
def dataset() -> None:
    """Export a curated dataset, or show its card."""


@dataset.command()
@click.option("--format", "format", type=click.Choice(list(WRITERS)), required=True, help="The format to write.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="The split to write.")
@click.option(
    "--out", "path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The file to write: a JSON array if its name ends in .json, else JSON lines. "
    "Default <loop>-<version>-<split>.<format>.jsonl in the current folder.",
)  # fmt: skip
@_version_option
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@loop_option
def export(loop: LoopSettings, format: str, split: str, path: Path | None, version: str | None, force: bool) -> None:
    """Write a dataset's examples for other tools.

    `finetune ingest` reads each format too.
    """
    found = _find_dataset(loop, version)
    path = path or Path(f"{loop.name}-{found.manifest.version}-{split}.{format}.jsonl")
    system_prompt = str(found.manifest.settings.get("system_prompt", loop.system_prompt))
    try:
        written = export_examples(path, read_examples(found.path, split), format, system_prompt, force=force)
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
    found = _find_dataset(loop, version)
    if as_json:
        print_json({**found.manifest.model_dump(), "folder": found.path})
        return
    click.echo((found.path / DATASET_CARD).read_text(encoding="utf-8"), nl=False)


def _find_dataset(loop: LoopSettings, version: str | None) -> Artifact[DatasetManifest]:
    """Return the dataset of this version, or the newest.

    Raises:
        ArtifactError: it does not exist, or it is damaged.
    """
    if version is None:
        newest = get_latest(DatasetManifest, loop.name)
        if newest is None:
            raise ArtifactError(f"loop {loop.name} has no dataset yet; `{with_loop('finetune run', loop)}` builds one")
        return newest
    folder = stage_folder(loop.name, DatasetManifest.stage)
    versions = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    known = sorted(name for name in versions if not name.startswith("."))
    if version not in known:  # so it is never a path
        raise ArtifactError(
            f"loop {loop.name} has no dataset {version!r}; its datasets are: {', '.join(known) or 'none'}"
        )
    return read(DatasetManifest, folder / version)
