"""The `finetune` command with its groups; expected errors are printed without a traceback."""

import sys

import click

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.cli.ask import ask
from finetune_pipeline.cli.dataset import dataset
from finetune_pipeline.cli.doctor import doctor
from finetune_pipeline.cli.feedback import feedback
from finetune_pipeline.cli.ingest import ingest
from finetune_pipeline.cli.model import model
from finetune_pipeline.cli.review import review
from finetune_pipeline.cli.run import check, demo, env, run, ui
from finetune_pipeline.cli.serve import key, serve
from finetune_pipeline.cli.status import status
from finetune_pipeline.cli.train import train
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import DatabaseError
from finetune_pipeline.database.api_keys import ApiKeyError
from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.evaluation.report import ReportError
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.feedback import FeedbackError
from finetune_pipeline.feedback.review import ReviewError
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.registry.model_versions import RegistryError
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.settings import SettingsError
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.wording import sentence

EXPECTED = (
    ArtifactError,
    BenchmarkError,
    ClusterError,
    ComparisonError,
    CurationError,
    DatabaseError,
    EngineError,
    ExportError,
    FeedbackError,
    ApiKeyError,
    RegistryError,
    ReportError,
    ReviewError,
    SchemaError,
    SettingsError,
    SourceError,
    TrainingError,
)
"""Errors whose message says what was found and what to do; any other exception is a bug and keeps its traceback."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="finetune-pipeline")
def finetune() -> None:
    """Fine-tune, evaluate, promote and serve a language model that improves from use."""


for command in (
    run,
    check,
    demo,
    ui,
    env,
    status,
    ingest,
    dataset,
    feedback,
    review,
    ask,
    model,
    train,
    serve,
    key,
    doctor,
):
    finetune.add_command(command)


def main() -> None:
    """Run the command; the entry point of the package."""
    try:
        finetune()
    except EXPECTED as error:
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {sentence(str(error))}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
