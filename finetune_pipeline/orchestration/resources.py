"""The Dagster resources: the home with its database, and the IO manager that passes artifacts between assets."""

import base64
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import dagster as dg
from pydantic import Field
from pydantic_core import to_jsonable_python

from finetune_pipeline import artifacts
from finetune_pipeline.artifacts import Artifact, ArtifactError
from finetune_pipeline.database import Database, connect
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    Manifest,
    PromotionManifest,
    RawLogsManifest,
    ReportManifest,
)
from finetune_pipeline.settings import LoopSettings, home, project_path

HOME = "finetune_home"
ARTIFACTS = "artifacts"
"""Resource keys of the home and of the IO manager."""

ARTIFACT = dg.PythonObjectDagsterType(Artifact)  # reading the manifest checks of which stage it is

STAGES: dict[str, type[Manifest]] = {
    kind.stage: kind
    for kind in (RawLogsManifest, DatasetManifest, AdapterManifest, GgufManifest, ReportManifest, PromotionManifest)
}


class FinetuneHome(dg.ConfigurableResource[Any]):
    """The folder and the database that hold the state of all loops."""

    path: str = Field(description="Folder of artifacts, caches and, by default, the SQLite database: FINETUNE_HOME.")
    database_url: str = Field(
        default="", description="FINETUNE_DATABASE_URL, a SQLAlchemy URL; empty: finetune.db in the folder."
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Set the variables that the pipeline and its child processes read."""
        self._export()

    def database(self) -> Database:
        """Open the database; create or migrate its tables if needed."""
        self._export()
        return connect()

    def _export(self) -> None:
        os.environ["FINETUNE_HOME"] = self.path
        if self.database_url:
            os.environ["FINETUNE_DATABASE_URL"] = self.database_url
        else:
            os.environ.pop("FINETUNE_DATABASE_URL", None)


class ArtifactIOManager(dg.ConfigurableIOManager):
    """Passes artifacts from asset to asset as pointers from a run to a version.

    An artifact is a complete folder on disk, so nothing is pickled. A step gets the version that its own run created,
    or, if it is materialized alone, the version that was created last.
    """

    home: FinetuneHome  # sets the folder that artifacts are read from

    def handle_output(self, context: dg.OutputContext, obj: Artifact[Any]) -> None:
        """Store which version this run created."""
        artifacts.set_latest(obj.manifest, context.run_id)

    def load_input(self, context: dg.InputContext) -> Artifact[Any]:
        """Return the version of this run, or the latest one.

        Raises:
            ArtifactError: the asset was never materialized, or its artifact is missing or was edited.
        """
        output = context.upstream_output
        assert output is not None  # every input is an asset
        loop, kind = output.definition_metadata["loop"], STAGES[output.definition_metadata["stage"]]
        # Of an asset that is not part of the run, the run id is a placeholder without an artifact.
        found = artifacts.get_latest(kind, loop, output.run_id) or artifacts.get_latest(kind, loop)
        if found is None:
            raise ArtifactError(
                f"{kind.stage} of loop {loop} was never materialized in this home; materialize it first, or "
                "select everything upstream of the asset too"
            )
        artifacts.check_unaltered(found)
        return found


def resources() -> dict[str, Any]:
    """Return the resources that a loop's assets, checks and sensor need, for the home of this process."""
    return _resources(str(home()), "FINETUNE_DATABASE_URL" in os.environ)


@cache  # Dagster merges the definitions of several loops only if they name the same objects
def _resources(path: str, with_url: bool) -> dict[str, Any]:
    # The URL may hold a password, which the UI would show; a variable is shown by its name.
    url = dg.EnvVar("FINETUNE_DATABASE_URL") if with_url else ""
    finetune_home = FinetuneHome(path=path, database_url=url)
    return {HOME: finetune_home, ARTIFACTS: ArtifactIOManager(home=finetune_home)}


def loop_asset(
    loop: LoopSettings,
    kind: type[Manifest],
    *inputs: str,
    depends_on: Any,
    files: Sequence[str | None] = (),
    **options: Any,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Return `dg.asset` with the options that all assets of a loop share.

    Args:
        kind: the manifest of the asset's artifact.
        inputs: names of assets of the same loop.
        depends_on: the settings that the asset depends on. Their hash and the package's version are the code version,
            so Dagster shows the asset as out of date after an upgrade or a change of these settings.
        files: files that the settings name; their content is part of the code version.
        options: further options of `dg.asset`.
    """
    prefix = loop.prefix or None
    paths = [project_path(name) for name in files if name]
    contents = [artifacts.hash_file_cached(path) if path.is_file() else "missing" for path in paths]
    package = artifacts.package_versions("finetune-pipeline")["finetune-pipeline"]
    decorator: Callable[[Callable[..., Any]], dg.AssetsDefinition] = dg.asset(
        key_prefix=prefix,
        group_name=loop.name,
        owners=loop.owners,
        io_manager_key=ARTIFACTS,
        dagster_type=ARTIFACT,
        ins={name: dg.AssetIn(key_prefix=prefix, dagster_type=ARTIFACT) for name in inputs},
        metadata={"loop": loop.name, "stage": kind.stage},
        code_version=f"{package}-{artifacts.hash_of(to_jsonable_python([depends_on, contents]))[:12]}",
        **options,
    )
    return decorator


def materialized(
    artifact: Artifact[Any], metadata: dict[str, Any], checks: Sequence[dg.AssetCheckResult] = ()
) -> dg.MaterializeResult[Any]:
    """Return the result of a step: its artifact, with the hash of its manifest as the data version."""
    # A whole path cannot wrap in the UI's table; it would push the values of all rows out of sight.
    folder = artifact.path.relative_to(home() / "artifacts")
    metadata = {**metadata, "version": artifact.manifest.version, "folder in FINETUNE_HOME/artifacts": str(folder)}
    version = dg.DataVersion(artifact.sha256[:16])
    return dg.MaterializeResult(value=artifact, data_version=version, metadata=metadata, check_results=checks)


def percent(fraction: float) -> float:
    """Return a fraction as percent, rounded to the one decimal that people compare."""
    return round(100 * fraction, 1)


def picture(png: bytes, title: str) -> str:
    """Return an image in Markdown, which Dagster's UI shows."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})"
