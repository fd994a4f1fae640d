"""The Dagster entry point: the component, one file per asset, checks, automation, IO manager."""

from finetune_pipeline.orchestration.component import FineTuneLoop

__all__ = ["FineTuneLoop"]
