"""The scaffolder of `dg scaffold defs finetune_pipeline.orchestration.FineTuneLoop NAME`."""

import json
import os
from pathlib import Path

import click
import dagster as dg
import yaml
from pydantic import BaseModel, Field, ValidationError

from finetune_pipeline.settings import COMPONENT_TYPE, PROJECT_ROOT, LoopSettings
from finetune_pipeline.validation_messages import error_message

SCHEMA = PROJECT_ROOT / "finetune_pipeline" / "defs.schema.json"

_DEFS = """\
# yaml-language-server: $schema={schema}
# Every setting is described in docs/reference/settings.md; paths are relative to the project.
type: {type}

attributes:
  name: {name}
  description: What the model of this loop does, in one sentence.

  base_model: {base_model}     # a folder with safetensors and a chat template, or a Hugging Face id
  system_prompt: ""

  training:
    learning_rate: {learning_rate}     # about 2e-4 for a pretrained model
    num_train_epochs: 3
    max_length: 512

  evaluation:
    benchmark: {benchmark}     # replace its questions with your own, at least 40
    metric: rouge1             # ROUGE-1 recall of free text; exact; parameters needs output_schema
    max_tokens: 128
    context: 512

  gate:
    min_gain: 0.05             # a challenger must be 5% better than the champion

  trigger:
    new_examples: 50           # new high-reward examples that start a run
    running: false             # the sensor is off until it is switched on in the UI
"""

_QUESTIONS = (
    (
        "Summarize: The invoice of May is still open, Ana will remind the client.",
        "Ana reminds the client of May's bill",
    ),
    ("Summarize: The printer on floor 2 is broken again, Ben ordered a new one.", "Ben ordered a new printer"),
)


class LoopParams(BaseModel):
    """Options of the command."""

    base_model: str = Field(default="data/starter_model", description="Hugging Face id, or a local folder.")


class LoopScaffolder(dg.Scaffolder[LoopParams]):
    """Writes the `defs.yaml` of a new loop with a benchmark to fill in, named after its folder."""

    @classmethod
    def get_scaffold_params(cls) -> type[LoopParams]:
        """Return the model of the command's options."""
        return LoopParams

    def scaffold(self, request: dg.ScaffoldRequest[LoopParams]) -> None:
        """Write both files into the new folder.

        Raises:
            ClickException: the folder's name cannot be a loop's name; nothing is written.
        """
        folder = request.target_path
        benchmark = folder / "benchmark.jsonl"
        base_model = request.params.base_model
        text = _DEFS.format(
            schema=Path(os.path.relpath(SCHEMA, folder)).as_posix(),
            type=COMPONENT_TYPE,
            name=folder.name,
            base_model=json.dumps(base_model),
            learning_rate="2.0e-3" if base_model == LoopParams().base_model else "2.0e-4",
            benchmark=os.path.relpath(benchmark, PROJECT_ROOT) if benchmark.is_relative_to(PROJECT_ROOT) else benchmark,
        )
        try:
            LoopSettings.model_validate(yaml.safe_load(text)["attributes"])
        except ValidationError as error:
            folder.rmdir()  # Dagster has just created it
            raise click.ClickException(f"No loop can be named {folder.name!r}: {error_message(error)}") from error
        rows = [
            {"id": f"q{number}", "slice": "examples", "prompt": prompt, "expected": expected}
            for number, (prompt, expected) in enumerate(_QUESTIONS, start=1)
        ]
        benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "defs.yaml").write_text(text, encoding="utf-8")
