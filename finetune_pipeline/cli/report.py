"""`finetune report`: the newest evaluation report of a loop."""

import click

from finetune_pipeline.artifacts import ArtifactError, get_latest
from finetune_pipeline.cli.options import json_option, loop_option, print_json
from finetune_pipeline.evaluation.report import HTML, JSON
from finetune_pipeline.manifests import ReportManifest
from finetune_pipeline.settings import LoopSettings, with_loop


@click.command()
@click.option("--open", "in_browser", is_flag=True, help="Open it in the browser.")
@json_option
@loop_option
def report(loop: LoopSettings, in_browser: bool, as_json: bool) -> None:
    """Show the newest evaluation report: verdict and path.

    It compares the challenger with the champion, with all answers. `finetune model show` names the report of an older
    version.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.sealed_benchmark import sealed_summary

    found = get_latest(ReportManifest, loop.name)
    if found is None:
        raise ArtifactError(f"loop {loop.name} has no report yet; `{with_loop('finetune run', loop)}` makes one")
    path, manifest = found.path / HTML, found.manifest
    if as_json:
        kept = {"comparison_id", "decision", "reason", "champion_id", "challenger_sha256", "created_at"}
        print_json({**manifest.model_dump(include=kept), "html": path, "json": found.path / JSON})
    else:
        click.echo(f"{manifest.decision}: {manifest.reason}")
        if sealed := sealed_summary(loop, connect()):
            click.echo(f"sealed benchmark: {sealed}")
        click.echo(path)
    if in_browser and click.launch(path.as_uri()) != 0:
        raise click.ClickException(f"No browser could be started; open {path} by hand.")
