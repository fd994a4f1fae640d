"""The summary of a run: examples, training, the comparison of the models, the verdict, and what to do next."""

from collections.abc import Iterator

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.report import HTML, JSON, metrics_of_report
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, PromotionManifest, ReportManifest
from finetune_pipeline.pipeline.approval import PendingApproval, pending_approval
from finetune_pipeline.settings import LoopSettings, home, with_loop
from finetune_pipeline.wording import counted


def run_summary(loop: LoopSettings, run_id: str, *, succeeded: bool) -> Iterator[str]:
    """Yield the lines of a run's summary, without those of assets that the run did not materialize."""
    yield f"home      {home()}"
    dataset, adapter = get_latest(DatasetManifest, loop.name, run_id), get_latest(AdapterManifest, loop.name, run_id)
    report, promotion = get_latest(ReportManifest, loop.name, run_id), get_latest(PromotionManifest, loop.name, run_id)
    if dataset:
        d = dataset.manifest
        yield (
            f"examples  {d.train - d.replayed:,} training + {d.replayed:,} replay, "
            f"{d.validation:,} validation, {sum(d.left_out.values()):,} left out"
        )
    if adapter:
        a = adapter.manifest
        measured_on = "validation" if dataset and dataset.manifest.validation else "training"
        yield (
            f"training  {measured_on} loss {a.loss_before:.3f} -> {a.loss_after:.3f} in {a.steps:,} steps, "
            f"{a.wall_seconds:.0f} s, {a.tokens_per_second:,.0f} tokens/s, "
            f"peak {a.peak_memory_bytes / 2**30:.2f} GiB on {a.device}"
        )
    if report:
        metrics = metrics_of_report(report.path / JSON)
        rows: list[tuple[str, ...]] = [("metric", metrics.base or "", metrics.champion, metrics.challenger, "change")]
        rows += [(row.name, *row.cells) for row in metrics.rows]
        if metrics.base is None:
            rows = [(name, *cells) for name, _, *cells in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *values in rows:
            cells = [name.ljust(widths[0]), *map(str.rjust, values, widths[1:])]
            yield "  ".join(cells)
        statement, *reasons = report.manifest.reason.split("\n")
        yield f"verdict   {report.manifest.decision}: {statement}"
        for reason in [*reasons, *(metrics.problems if not report.manifest.promote else ())]:
            yield f"          {reason}"
        yield f"report    {report.path / HTML}"
    if promotion:
        yield f"promoted  {promotion.manifest.model}"
        if promotion.manifest.fixed:
            yield f"fixed     {counted(promotion.manifest.fixed, 'correction')}, now in the regression suite"
        if promotion.manifest.sealed:
            yield f"sealed    {promotion.manifest.sealed}"
        yield f"GGUF      {promotion.manifest.gguf_path}"
        yield f'next      try it:   {with_loop("finetune ask", loop)} "..."'
        yield "          serve it: finetune serve"
        yield f"          undo it:  {with_loop('finetune model rollback', loop)}"
    elif report and (pending := approval_of(loop, report.manifest.comparison_id)):
        yield f"approval  {pending.summary}"
    elif report and not report.manifest.promote:
        yield f"next      {next_after_verdict(report.manifest.decision)}"
    elif not succeeded:
        yield f"next      fix the cause, then `{with_loop('finetune run', loop)}`; finished work is reused"
    elif adapter:
        yield "next      nothing new to promote; log more feedback, then run again"


def approval_of(loop: LoopSettings, comparison_id: str) -> PendingApproval | None:
    """Return the approval that the challenger of a comparison waits for; None if it does not wait."""
    pending = pending_approval(loop, connect())
    return pending if pending and pending.approval.comparison_id == comparison_id else None


def next_after_verdict(decision: str) -> str:
    """Return what to do after a verdict that promotes nothing: "reject" or "inconclusive"."""
    if decision == "inconclusive":
        return "the champion stays; add questions to the benchmark, or log more feedback, then run again"
    return "the champion stays; see the answers in the report, log more feedback, then run again"
