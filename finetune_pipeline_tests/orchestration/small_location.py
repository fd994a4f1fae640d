"""A code location with a job of three small assets; the environment variable SECOND says what the second one does."""

import os
import subprocess
from pathlib import Path

import dagster as dg

from finetune_pipeline.artifacts import ArtifactBusyError
from finetune_pipeline.definitions import EXECUTOR

NAMES = {"key_prefix": "notes", "group_name": "notes"}


CHECKS = [dg.AssetCheckSpec(name, asset=["notes", "first"], blocking=name == "fine") for name in ("fine", "doubtful")]


@dg.asset(**NAMES, check_specs=CHECKS)
def first(context):
    context.log.info("3 files")
    context.log.debug("not for people")
    context.log.warning("Data version mismatch for asset AssetKey(['notes', 'first'])")  # as Dagster words it
    yield dg.MaterializeResult()
    is_rejected = os.environ.get("SECOND") == "rejected"
    reason = "1 of 3 correct\n\n- it needs more than 2\n- most answers are invalid" if is_rejected else None
    yield dg.AssetCheckResult(check_name="fine", passed=not is_rejected, description=reason)
    warning = dg.AssetCheckSeverity.WARN
    yield dg.AssetCheckResult(check_name="doubtful", passed=False, severity=warning, description="1 of 3")


@dg.asset(**NAMES, deps=[first])
def second(context):
    match os.environ.get("SECOND"):
        case "busy":
            raise ArtifactBusyError("another run creates it now; wait")
        case "bug":
            raise KeyError("prompt")
        case "gate":
            raise dg.Failure("not promoted: 5% needed", allow_retries=False)
        case "sleep":
            child = subprocess.Popen(["sleep", "1000"])
            context.log.info("sleeping")
            try:
                child.wait()
            finally:
                child.kill()
                child.wait()
                Path(os.environ["CLEANED_UP"]).touch()


@dg.asset(**NAMES, deps=[second])
def third():
    pass


job = dg.define_asset_job("notes_loop", selection=dg.AssetSelection.groups("notes"))
defs = dg.Definitions(assets=[first, second, third], jobs=[job], executor=EXECUTOR)
