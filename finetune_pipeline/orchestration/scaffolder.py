"""The scaffolder of `dg scaffold defs finetune_pipeline.orchestration.FineTuneLoop NAME`."""

import os

import click
import dagster as dg
from pydantic import BaseModel, Field

from finetune_pipeline.pipeline.loop_template import DEFAULT_BASE, NewLoop, check_name, files_of
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError
from finetune_pipeline.wording import sentence


class LoopParams(BaseModel):
    """Options of the command."""

    base_model: str = Field(default=DEFAULT_BASE, description="Hugging Face id, or a local folder.")


class LoopScaffolder(dg.Scaffolder[LoopParams]):
    """Writes the files of `finetune init`, without data, into a folder of the package."""

    @classmethod
    def get_scaffold_params(cls) -> type[LoopParams]:
        """Return the model of the command's options."""
        return LoopParams

    def scaffold(self, request: dg.ScaffoldRequest[LoopParams]) -> None:
        """Write the files into the new folder.

        Raises:
            ClickException: the folder's name cannot be a loop's name; nothing is written.
        """
        folder = request.target_path
        try:
            check_name(folder.name)
        except SettingsError as error:
            folder.rmdir()  # Dagster has just created it
            raise click.ClickException(sentence(str(error))) from error
        root = os.path.relpath(folder, PROJECT_ROOT) if folder.is_relative_to(PROJECT_ROOT) else str(folder)
        for name, text in files_of(NewLoop(folder.name, request.params.base_model, root=f"{root}/"), folder).items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
