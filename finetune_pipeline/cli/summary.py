"""The summary after a demo: examples, training, the comparison of the models, and the verdict."""

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.evaluation.report import HTML, JSON, ReportMetrics, metrics_of_report
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, PromotionManifest, ReportManifest
from finetune_pipeline.settings import LoopSettings


def show_summary(loop: LoopSettings) -> None:
    """Print a summary of the newest artifacts of a loop, without the assets that were not materialized."""
    dataset = get_latest(DatasetManifest, loop.name)
    if dataset is not None:
        m = dataset.manifest
        click.echo(
            f"examples  {m.train + m.validation - m.replayed} from use ({m.validation} to validate), "
            f"{m.replayed} replayed, {sum(m.left_out.values())} left out"
        )
    adapter = get_latest(AdapterManifest, loop.name)
    if adapter is not None:
        a = adapter.manifest
        click.echo(
            f"training  loss {a.loss_before:.3f} -> {a.loss_after:.3f} in {a.steps} steps, {a.wall_seconds:.0f} s, "
            f"{a.tokens_per_second:,.0f} tokens/s, peak {a.peak_memory_bytes / 2**30:.2f} GiB on {a.device}"
        )
    report = get_latest(ReportManifest, loop.name)
    if report is not None:
        Console().print(_table(metrics_of_report(report.path / JSON)))
        verdict = click.style("promote", fg="green") if report.manifest.promote else click.style("reject", fg="red")
        click.echo(f"verdict   {verdict}: {report.manifest.reason}")
        click.echo(f"report    {report.path / HTML}")
    promotion = get_latest(PromotionManifest, loop.name)
    if promotion is not None:
        click.echo(f"promoted  {click.style(promotion.manifest.model, bold=True)}")
        click.echo(f"GGUF      {promotion.manifest.gguf_path}")


def _table(metrics: ReportMetrics) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for heading in (metrics.champion, metrics.challenger, "change"):
        table.add_column(heading, justify="right")
    for row in metrics.rows:
        table.add_row(row.name, *row.cells)
    return table
