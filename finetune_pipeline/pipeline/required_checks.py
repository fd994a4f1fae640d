"""The checks that a model must have passed before it is evaluated or promoted.

Each blocking check of the model and of the datasets that it was trained on must have a passing outcome in the database,
recorded for exactly the hash of the content.
"""

from collections.abc import Iterable

from finetune_pipeline.artifacts import Artifact, ArtifactError, check_unaltered, read, stage_folder
from finetune_pipeline.curation.dataset_checks import inspect_dataset
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import DatasetManifest, GgufManifest, Manifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.registry.check_outcomes import outcomes_of
from finetune_pipeline.settings import LoopSettings


class RequiredChecksError(ArtifactError):
    """Raised if a blocking check of a model or one of its datasets failed or was not run."""


def check_proven(gguf: Artifact[GgufManifest]) -> None:
    """Check that all blocking checks of a model and of its datasets passed.

    Raises:
        RequiredChecksError: the message names the artifact, the checks, and what to do.
    """
    manifest = gguf.manifest
    if not manifest.datasets:
        raise RequiredChecksError(
            f"gguf_model {manifest.version} does not name the dataset that it was trained on, since an earlier version "
            "of this project made it; materialize curated_dataset and everything after it again"
        )
    for version, sha256 in manifest.datasets.items():
        check_passed(manifest.loop, DatasetManifest, version, sha256)
    check_passed(manifest.loop, GgufManifest, manifest.version, gguf.sha256)


def check_passed(loop: str, kind: type[Manifest], version: str, sha256: str) -> None:
    """Check that each blocking check of an artifact passed.

    Raises:
        RequiredChecksError: a check failed, or did not run on this content.
    """
    outcomes = outcomes_of(connect(), loop, kind, version, sha256)
    problems = [
        f"{name} failed in run {outcomes[name].run_id[:8]}" if name in outcomes else f"{name} was not run on it"
        for name in kind.blocking_checks
        if name not in outcomes or not outcomes[name].passed
    ]
    if problems:
        raise RequiredChecksError(
            f"{kind.stage} {version} did not pass its blocking checks: {', '.join(problems)}; no model made from it "
            f"is promoted. Fix the cause, then materialize {kind.stage} and everything after it again"
        )


def dataset_of(loop: str, version: str) -> Artifact[DatasetManifest]:
    """Return a dataset that a model was trained on.

    Raises:
        ArtifactError: it is missing, or was edited.
    """
    dataset = read(DatasetManifest, stage_folder(loop, DatasetManifest.stage) / version)
    check_unaltered(dataset)
    return dataset


def near_benchmark(loop: LoopSettings, datasets: Iterable[str]) -> str | None:
    """Return which of these datasets has near-duplicates of the benchmark, as a sentence; None if none has.

    The check no_benchmark_overlap compared each with the benchmark at the time. A warm-started model was trained on its
    own dataset and on those of the adapter that it started from.

    Args:
        datasets: versions of all datasets that a model was trained on.

    Raises:
        ArtifactError: a dataset is missing, or was edited.
    """
    now = loop_files.question_files(loop)
    for dataset in (dataset_of(loop.name, version) for version in datasets):
        if now.items() <= dataset.manifest.inputs.items():
            continue
        near = inspect_dataset(dataset.path, loop_files.policy(loop)).near_benchmark
        if near:
            return (
                f"curated_dataset {dataset.manifest.version} was made for another benchmark, and {len(near)} of its "
                f"examples are near-duplicates of questions of this one ({', '.join(near[:3])})"
            )
    return None
