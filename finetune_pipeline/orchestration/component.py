"""The Dagster component `FineTuneLoop`, which builds the definitions of one loop from one YAML."""

from typing import Self

import dagster as dg
from pydantic import BaseModel

from finetune_pipeline.orchestration.alerts import alert_sensor
from finetune_pipeline.orchestration.automation import automation
from finetune_pipeline.orchestration.checks import curated_dataset_checks, eval_report_checks
from finetune_pipeline.orchestration.curated_dataset import curated_dataset_asset
from finetune_pipeline.orchestration.eval_report import eval_report_asset
from finetune_pipeline.orchestration.gguf_model import gguf_model_asset
from finetune_pipeline.orchestration.history import history_sensor
from finetune_pipeline.orchestration.lora_adapter import lora_adapter_asset
from finetune_pipeline.orchestration.promoted_model import promoted_model_asset
from finetune_pipeline.orchestration.raw_logs import raw_logs_asset
from finetune_pipeline.orchestration.resources import resources
from finetune_pipeline.orchestration.scaffolder import LoopScaffolder
from finetune_pipeline.settings import LoopSettings


@dg.scaffold_with(LoopScaffolder)
class FineTuneLoop(dg.Component):
    """One fine-tuning loop: six assets, their checks, a job, sensors and two schedules."""

    def __init__(self, settings: LoopSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """Return the model that validates `attributes:` of a `defs.yaml`."""
        return LoopSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        """Return the component for validated settings."""
        if not isinstance(attributes, LoopSettings):
            raise dg.DagsterInvalidDefinitionError("a loop needs `attributes:` with its settings; see the reference")
        return cls(attributes)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Return the loop's definitions."""
        return loop_definitions(self.settings)


def loop_definitions(loop: LoopSettings) -> dg.Definitions:
    """Return the assets, checks, job, sensors, schedules and resources of a loop."""
    assets = [
        raw_logs_asset(loop),
        curated_dataset_asset(loop),
        lora_adapter_asset(loop),
        gguf_model_asset(loop),
        eval_report_asset(loop),
        promoted_model_asset(loop),
    ]
    checks = [curated_dataset_checks(loop), eval_report_checks(loop)]
    sensors = [alert_sensor(loop), history_sensor(loop)]
    return dg.Definitions.merge(
        dg.Definitions(assets=assets, asset_checks=checks, sensors=sensors, resources=resources()),
        automation(loop),
    )
