"""The `finetune` command with its groups; expected errors are printed without a traceback."""

import errno
import sys
from pathlib import Path
from typing import NoReturn

import click

from finetune_pipeline.artifacts import disk_full
from finetune_pipeline.cli.alerts import alerts
from finetune_pipeline.cli.ask import ask
from finetune_pipeline.cli.compare import compare
from finetune_pipeline.cli.console import console
from finetune_pipeline.cli.dataset import dataset
from finetune_pipeline.cli.deploy import deploy
from finetune_pipeline.cli.doctor import doctor
from finetune_pipeline.cli.feedback import feedback
from finetune_pipeline.cli.ingest import ingest
from finetune_pipeline.cli.init import init
from finetune_pipeline.cli.model import model
from finetune_pipeline.cli.report import report
from finetune_pipeline.cli.review import review
from finetune_pipeline.cli.run import check, demo, env, run, ui
from finetune_pipeline.cli.serve import key, serve
from finetune_pipeline.cli.source import source
from finetune_pipeline.cli.status import status
from finetune_pipeline.cli.train import train
from finetune_pipeline.cli.up import up
from finetune_pipeline.pipeline.expected_errors import EXPECTED
from finetune_pipeline.settings import home
from finetune_pipeline.wording import sentence


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="finetune-pipeline")
def finetune() -> None:
    """Fine-tune, evaluate, promote and serve a language model that improves from use."""


for command in (
    init,
    run,
    check,
    demo,
    up,
    ui,
    env,
    status,
    ingest,
    source,
    dataset,
    feedback,
    review,
    ask,
    model,
    deploy,
    compare,
    report,
    alerts,
    train,
    serve,
    console,
    key,
    doctor,
):
    finetune.add_command(command)


def main() -> None:
    """Run the command; the entry point of the package."""
    try:
        finetune()
    except EXPECTED as error:
        fail(str(error))
    except OSError as error:
        problem = unwritable_home(error)
        if problem is None:
            raise
        fail(problem)


def fail(message: str) -> NoReturn:
    """Print an error and end the command."""
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {sentence(message)}", err=True)
    sys.exit(1)


def unwritable_home(error: OSError) -> str | None:
    """Return the message for a full disk, or for a file of the home that cannot be used; None for other errors."""
    path = Path(str(error.filename or home()))
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return str(disk_full(path, error.strerror))
    if not (path.is_relative_to(home()) or home().is_relative_to(path)):
        return None
    return (
        f"{path} cannot be used ({error.strerror}); make {home()} and everything in it writable, or set FINETUNE_HOME "
        "to a folder that is"
    )


if __name__ == "__main__":
    main()
