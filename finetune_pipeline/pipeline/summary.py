"""The newest artifacts of a loop, for a summary of its last run."""

from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.evaluation.report import HTML, JSON, ReportMetrics, metrics_of_report
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, PromotionManifest, ReportManifest


@dataclass(frozen=True)
class LoopSummary:
    """The newest artifacts of a loop; None for those that were not materialized."""

    dataset: DatasetManifest | None
    adapter: AdapterManifest | None
    report: ReportManifest | None
    metrics: ReportMetrics | None
    report_page: Path | None
    promotion: PromotionManifest | None


def read_summary(loop: str) -> LoopSummary:
    """Return the manifests of the newest artifacts of a loop, and the metrics of its newest report."""
    dataset, adapter = get_latest(DatasetManifest, loop), get_latest(AdapterManifest, loop)
    report, promotion = get_latest(ReportManifest, loop), get_latest(PromotionManifest, loop)
    return LoopSummary(
        dataset=dataset.manifest if dataset else None,
        adapter=adapter.manifest if adapter else None,
        report=report.manifest if report else None,
        metrics=metrics_of_report(report.path / JSON) if report else None,
        report_page=report.path / HTML if report else None,
        promotion=promotion.manifest if promotion else None,
    )
