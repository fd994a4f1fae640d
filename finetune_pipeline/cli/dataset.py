"""`finetune dataset`: the curated datasets, out of the project and on paper."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from finetune_pipeline.artifacts import Artifact, ArtifactError, get_latest, read, stage_folder
from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.curation.dataset_files import DATASET_CARD, SPLITS, read_examples
from finetune_pipeline.curation.export_formats import WRITERS, write_rows
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.settings import LoopSettings

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    Dataset = Artifact[DatasetManifest]


@click.group()
def dataset() -> None:
    """Export a curated dataset, or show its card."""


def _version_option(command: F) -> F:
    help = "Which version, as the asset curated_dataset and the folder say it; default the newest."
    return click.option("--version", metavar="VERSION", help=help)(command)


@dataset.command()
@click.option("--format", "form", type=click.Choice(list(WRITERS)), required=True, help="In which form.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which part of it.")
@click.option(
    "--out", "path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Where to; a name in .json gives a JSON array, any other JSON lines. "
    "Default <loop>-<version>-<split>.<format>.jsonl in this folder.",
)  # fmt: skip
@_version_option
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@loop_option
def export(loop: LoopSettings, form: str, split: str, path: Path | None, version: str | None, force: bool) -> None:
    """Write a dataset's examples as other tools read them; `finetune ingest` reads each form too."""
    found = _dataset(loop, version)
    path = path or Path(f"{loop.name}-{found.manifest.version}-{split}.{form}.jsonl")
    system_prompt = str(found.manifest.settings.get("system_prompt", loop.system_prompt))
    try:
        written = write_rows(path, read_examples(found.path, split), form, system_prompt, force=force)
    except FileExistsError as error:
        raise click.ClickException(
            f"{path} is there already; name another file with --out, or overwrite it with --force"
        ) from error
    except OSError as error:
        raise click.ClickException(
            f"{path} could not be written ({error.strerror}); name a file in a folder that is there, with room for it"
        ) from error
    click.echo(f"{written} examples of {loop.name} {found.manifest.version} ({split}) written to {path}")


@dataset.command()
@_version_option
@loop_option
def card(loop: LoopSettings, version: str | None) -> None:
    """Show what a dataset is made of: sources, counts, filters, what was left out and why, a sample."""
    found = _dataset(loop, version)
    path = found.path / DATASET_CARD
    if not path.is_file():
        raise click.ClickException(
            f"dataset {found.manifest.version} was made before there were cards; `finetune run` makes a new one"
        )
    click.echo(path.read_text(encoding="utf-8"), nl=False)


def _dataset(loop: LoopSettings, version: str | None) -> "Dataset":
    """The dataset of this version, or the one made last.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    folder = stage_folder(loop.name, DatasetManifest.stage)
    if version is None:
        newest = get_latest(DatasetManifest, loop.name)
        if newest is None:
            raise ArtifactError(f"loop {loop.name} has no dataset yet; `finetune run --loop {loop.name}` makes one")
        return newest
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    there = [name for name in there if not name.startswith(".")]
    if version not in there:  # so it is never a path
        known = ", ".join(there) or "none"
        raise ArtifactError(f"loop {loop.name} has no dataset {version!r}; there are: {known}")
    return read(DatasetManifest, folder / version)
