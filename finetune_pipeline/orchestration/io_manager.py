"""The IO manager: it passes artifacts from asset to asset as pointers from a run to a version.

An artifact is a complete folder on disk, so nothing is pickled. A step gets the version that its own run created, or,
if it is materialized alone, the version that was created last.
"""

import base64
from collections.abc import Callable
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
    """Stores and loads pointers to the artifacts of one loop."""

    def __init__(self, loop: str) -> None:
        self._loop = loop

    def handle_output(self, context: dg.OutputContext, obj: Artifact[Any]) -> None:
        """Store which version this run created."""
        artifacts.set_latest(obj.manifest, context.run_id)

    def load_input(self, context: dg.InputContext) -> Artifact[Any]:
        """Return the version of this run, or the latest one.

        Raises:
            ArtifactError: the asset was never materialized, or its artifact is missing or was edited.
        """
        kind = STAGES[context.asset_key.path[-1]]
        own = artifacts.get_latest(kind, self._loop, context.step_context.run_id)
        found = own or artifacts.get_latest(kind, self._loop)
        if found is None:
            raise ArtifactError(
                f"{kind.stage} of loop {self._loop} was never materialized in this home; materialize it first, or "
                f"select everything upstream with '*{PromotionManifest.stage}'"
            )
        artifacts.check_unaltered(found)
        return found


def picture(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """Return an image as metadata that Dagster's UI shows."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")


def pointers_key(loop: LoopSettings) -> str:
    """Return the resource key of the loop's IO manager."""
    return f"{loop.name}_artifacts"


def loop_asset(loop: LoopSettings, *inputs: str, **options: Any) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Return `dg.asset` with the options that all assets of a loop share.

    Args:
        inputs: names of assets of the same loop.
        options: further options of `dg.asset`.
    """
    prefix = loop.prefix or None
    # Dagster cannot check a generic type. Reading the manifest checks it.
    ins = {name: dg.AssetIn(key_prefix=prefix, dagster_type=dg.Any) for name in inputs}
    decorator: Callable[[Callable[..., Any]], dg.AssetsDefinition] = dg.asset(
        key_prefix=prefix, group_name=loop.name, io_manager_key=pointers_key(loop), ins=ins, **options
    )
    return decorator
