"""How assets find each other's artifacts: a small pointer from a run to a version, never "the newest folder".

Dagster's own IO managers would pickle values; here the value is a complete artifact on disk, and what is kept for a run
is only which version it made. A step of the same run gets that run's version; a step materialized alone gets the one
that was made last.
"""

import base64
from typing import Any

import dagster as dg

from finetune_pipeline import artifacts
from finetune_pipeline.artifacts import Artifact, ArtifactError
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    Manifest,
    PromotionManifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.settings import LoopSettings

STAGES: dict[str, type[Manifest]] = {
    kind.stage: kind
    for kind in (RawLogsManifest, DatasetManifest, AdapterManifest, GgufManifest, ReportManifest, PromotionManifest)
}


class ArtifactPointers(dg.IOManager):
    """Hands the artifacts of one loop from asset to asset."""

    def __init__(self, loop: str) -> None:
        self._loop = loop

    def handle_output(self, context: dg.OutputContext, obj: Artifact[Any]) -> None:
        """Remember which version this run made."""
        artifacts.set_latest(obj.manifest, context.run_id)

    def load_input(self, context: dg.InputContext) -> Artifact[Any]:
        """Return the version of this run, or the latest one; refuse one that was edited.

        Raises:
            ArtifactError: the stage was never materialized, or its artifact is gone or was edited.
        """
        kind = STAGES[context.asset_key.path[-1]]
        own = artifacts.get_latest(kind, self._loop, context.step_context.run_id)
        found = own or artifacts.get_latest(kind, self._loop)
        if found is None:
            raise ArtifactError(
                f"{kind.stage} of loop {self._loop} was never materialized here; materialize it first, or select "
                "everything upstream with '*promoted_model'"
            )
        artifacts.check_unaltered(found)
        return found


def picture(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A picture that Dagster's UI shows among the metadata."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")


def pointers_key(loop: LoopSettings) -> str:
    """The name under which the loop's pointers are a resource."""
    return f"{loop.name}_artifacts"


def upstream(loop: LoopSettings) -> dg.AssetIn:
    """An input from the asset of the argument's name in the same loop."""
    # Dagster cannot check a generic type by itself; the manifest's own type is checked when it is read.
    return dg.AssetIn(key_prefix=loop.prefix or None, dagster_type=dg.Any)
