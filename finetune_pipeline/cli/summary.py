"""The summary after a demo: examples, training, the comparison of the models, and the verdict."""

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.evaluation.report import ReportMetrics
from finetune_pipeline.pipeline.summary import read_summary
from finetune_pipeline.settings import LoopSettings


def show_summary(loop: LoopSettings) -> None:
    """Print a summary of the newest artifacts of a loop, without the assets that were not materialized."""
    summary = read_summary(loop.name)
    if m := summary.dataset:
        click.echo(
            f"examples  {m.train + m.validation - m.replayed} from use ({m.validation} to validate), "
            f"{m.replayed} replayed, {sum(m.left_out.values())} left out"
        )
    if a := summary.adapter:
        click.echo(
            f"training  loss {a.loss_before:.3f} -> {a.loss_after:.3f} in {a.steps} steps, {a.wall_seconds:.0f} s, "
            f"{a.tokens_per_second:,.0f} tokens/s, peak {a.peak_memory_bytes / 2**30:.2f} GiB on {a.device}"
        )
    if summary.report and summary.metrics:
        Console().print(_table(summary.metrics))
        verdict = click.style("promote", fg="green") if summary.report.promote else click.style("reject", fg="red")
        click.echo(f"verdict   {verdict}: {summary.report.reason}")
        click.echo(f"report    {summary.report_page}")
    if summary.promotion:
        click.echo(f"promoted  {click.style(summary.promotion.model, bold=True)}")
        click.echo(f"GGUF      {summary.promotion.gguf_path}")


def _table(metrics: ReportMetrics) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for heading in (metrics.champion, metrics.challenger, "change"):
        table.add_column(heading, justify="right")
    for row in metrics.rows:
        table.add_row(row.name, *row.cells)
    return table
