"""The freshness policy of promoted_model, as Dagster's daemon evaluates it and its UI shows it."""

import time
from datetime import timedelta

import dagster as dg
import pytest
import yaml
from dagster._core.events import StepMaterializationData
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.freshness import FreshnessDaemon
from dagster_graphql.test.utils import execute_dagster_graphql

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline_tests.orchestration.conftest import definitions
from finetune_pipeline_tests.orchestration.whole_loop.example_loop import DEFINITIONS

DAY = timedelta(days=1).total_seconds()
QUERY = """{ assetNodeOrError(assetKey: {path: ["notes", "promoted_model"]}) { ... on AssetNode {
  freshnessStatusInfo { freshnessStatus }
  internalFreshnessPolicy { ... on TimeWindowFreshnessPolicy { failWindowSeconds } }
} } }"""


def promoted(instance, seconds_ago):
    """Record a materialization of promoted_model with this age."""
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name="notes_loop",
        event_specific_data=StepMaterializationData(dg.AssetMaterialization(["notes", "promoted_model"])),
    )
    moment = time.time() - seconds_ago
    instance.handle_new_event(
        dg.EventLogEntry(
            error_info=None, level="debug", user_message="", run_id="", timestamp=moment, dagster_event=event
        )
    )


def policies(loop):
    return {spec.key.path[-1]: spec.freshness_policy for spec in definitions(loop).resolve_all_asset_specs()}


def test_only_promoted_model_has_a_policy_and_only_if_the_settings_say_so(make_loop):
    assert set(policies(make_loop()).values()) == {None}
    with_policy = policies(make_loop(alerts={"freshness_days": 30}))
    assert with_policy.pop("promoted_model") == dg.FreshnessPolicy.time_window(fail_window=timedelta(days=30))
    assert set(with_policy.values()) == {None}


@pytest.mark.slow
def test_the_ui_shows_whether_the_last_promotion_is_too_long_ago(make_loop, tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    make_loop(alerts={"freshness_days": 30})
    location = tmp_path / "loop.py"
    location.write_text(DEFINITIONS.format(yaml=str(tmp_path / "defs" / "notes" / "defs.yaml")))
    workspace = tmp_path / "workspace.yaml"
    workspace.write_text(yaml.safe_dump({"load_from": [{"python_file": str(location)}]}))
    with (
        dg.DagsterInstance.get() as instance,
        WorkspaceProcessContext(instance, WorkspaceFileTarget([str(workspace)])) as context,
    ):
        shown = []
        for age in (None, 31 * DAY, 29 * DAY):
            if age is not None:
                promoted(instance, age)
            list(FreshnessDaemon().run_iteration(context))
            node = execute_dagster_graphql(context.create_request_context(), QUERY).data["assetNodeOrError"]
            shown.append(node["freshnessStatusInfo"]["freshnessStatus"])
        assert node["internalFreshnessPolicy"] == {"failWindowSeconds": 30 * DAY}
        assert shown == ["UNKNOWN", "DEGRADED", "HEALTHY"]
