"""The sensor that shows in Dagster what people decided about a loop's models outside of its runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from finetune_pipeline.manifests import PromotionManifest
from finetune_pipeline.orchestration.checks import APPROVED
from finetune_pipeline.orchestration.promoted_model import ACTOR
from finetune_pipeline.orchestration.resources import FinetuneHome
from finetune_pipeline.pipeline.jobs import LOOP_TAG
from finetune_pipeline.registry.deployment_history import PROMOTING, Deployment, list_history
from finetune_pipeline.registry.model_versions import list_models
from finetune_pipeline.settings import LoopSettings

Event = dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation


def history_sensor(loop: LoopSettings) -> dg.SensorDefinition:
    """Return the sensor that reports new rows of the deployment history as events of promoted_model.

    It is on by default, since it starts nothing. Rows of this project's own runs have an event already.
    """

    @dg.sensor(
        name=f"{loop.name}_history",
        tags={LOOP_TAG: loop.name},
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Shows approvals, forced promotions, switches, rollbacks and archived versions of the loop "
        f"{loop.name} as events of {PromotionManifest.stage}.",
    )
    def history(context: dg.SensorEvaluationContext, finetune_home: FinetuneHome) -> dg.SensorResult:
        database = finetune_home.database()
        rows = list_history(database, loop.name, after=int(context.cursor or 0))
        names = {model.id: model.name for model in list_models(database, loop.name)}
        events = [event for row in rows if row.actor != ACTOR for event in _events(loop, row, names)]
        if not events:
            cursor = str(rows[-1].id) if rows else context.cursor
            return dg.SensorResult(skip_reason="nobody decided anything since", cursor=cursor)
        return dg.SensorResult(asset_events=events, cursor=str(rows[-1].id))

    return history


def _events(loop: LoopSettings, row: Deployment, names: Mapping[str, str]) -> Iterator[Event]:
    key = dg.AssetKey([*loop.prefix, PromotionManifest.stage])
    name = names.get(row.model_id or "", f"{loop.name}@{row.model_id or 'base'}")
    text = f"{name}: {row.action} by {row.actor}: {row.reason}"
    metadata: dict[str, Any] = {
        "model": name,
        "action": row.action,
        "actor": row.actor,
        "reason": row.reason,
        "time": dg.MetadataValue.timestamp(row.created_at),
    }
    if row.action in PROMOTING:
        yield dg.AssetMaterialization(key, description=text, metadata=metadata)
    else:
        yield dg.AssetObservation(key, description=text, metadata=metadata)
    if row.action in {"approve", "reject"} and loop.approval == "required":
        yield dg.AssetCheckEvaluation(
            asset_key=key,
            check_name=APPROVED,
            passed=row.action == "approve",
            severity=dg.AssetCheckSeverity.WARN,
            description=text,
            metadata=metadata,
        )
