"""Compare any two models on the loop's benchmark: versions, the base model, GGUF files, models of other servers.

The comparison is recorded and has a report, and changes nothing else: it judges no data and promotes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar
from urllib.parse import urldefrag, urlsplit

from pydantic import Field, ValidationError

from finetune_pipeline.artifacts import (
    Artifact,
    draft,
    hash_file_cached,
    model_sha256,
    package_versions,
    publish,
    version_of,
)
from finetune_pipeline.database import Database, connect
from finetune_pipeline.evaluation.comparison import Comparison, ComparisonError, Role
from finetune_pipeline.evaluation.report import HTML, write_report
from finetune_pipeline.evaluation.report_facts import ReportFacts
from finetune_pipeline.evaluation.run import Contender, compare_models
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import Manifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.challengers import find_trained
from finetune_pipeline.pipeline.evaluate import ProgressLog, comparison_settings, settings_hash
from finetune_pipeline.pipeline.judge_agreement import scorer_with_agreement
from finetune_pipeline.pipeline.regression_suite import ask_suite
from finetune_pipeline.pipeline.report_facts import Subject, collect_facts, subject_of
from finetune_pipeline.pipeline.sealed_benchmark import sealed_summary
from finetune_pipeline.registry.champion import BASE
from finetune_pipeline.registry.comparisons import ManualComparison, record_manual_comparison
from finetune_pipeline.registry.model_versions import check_files
from finetune_pipeline.settings import GateSettings, LoopSettings, UpstreamSettings

GGUF = ".gguf"
ENDPOINT_EXAMPLE = "http://localhost:8000/v1#model-name"


class ManualReportManifest(Manifest):
    """The report of a comparison that was made by hand."""

    stage: ClassVar[str] = "manual_comparison"
    first: str
    second: str
    wins: int = Field(description="Questions in which the second model's score is higher.")
    losses: int
    ties: int


@dataclass(frozen=True)
class NamedModel:
    """A model to compare, and what the registry knows of it."""

    contender: Contender
    subject: Subject


@dataclass(frozen=True)
class FinishedComparison:
    """A comparison with its report and its row in the registry.

    Attributes:
        threshold: the confidence above which curation accepts an unconfirmed answer.
        gate: the settings with the margin of the slices.
    """

    comparison: Comparison
    facts: ReportFacts
    threshold: float
    gate: GateSettings
    report: Artifact[ManualReportManifest]
    record: ManualComparison


def compare_two(
    loop: LoopSettings,
    first: str,
    second: str,
    log: Callable[[str], None],
    api_key_env: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> FinishedComparison:
    """Compare two models on the loop's benchmark as its evaluation does, write the report, and record the result.

    Answers of files are reused by hash. Another server is asked each time, since its model may have changed.

    Args:
        first: name of a version (`loop@v1.2.0`, `champion`, `previous`, `base`), the first digits of a challenger's
            SHA-256, path of a GGUF file, or an endpoint (`http://localhost:8000/v1#model`).
        second: the same; wins are its.
        api_key_env: environment variable with the API key of the endpoint.
        on_progress: called with a model's name, its answers so far, and the questions; default: they are logged.

    Raises:
        ComparisonError: a name is not understood, or both are the same model.
        RegistryError: there is no such version, or its files were deleted or differ.
        EngineError: a model cannot be loaded, or a server does not answer.
    """
    database = connect()
    pair = [find_model(loop, database, one, log, api_key_env) for one in (first, second)]
    _check_one_key(pair, api_key_env)
    _check_different(*(one.contender for one in pair))
    base = NamedModel(
        Contender(f"{loop.name}@{BASE}", ModelSpec(gguf=base_gguf(loop, log))), Subject(f"{loop.name}@{BASE}")
    )
    scorer, progress = scorer_with_agreement(loop, log, for_gate=False), on_progress or ProgressLog(log)
    comparison = compare_models(
        pair[0].contender,
        pair[1].contender,
        loop_files.benchmark(loop),
        scorer,
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        progress,
        base=base.contender,
        constraint=loop_files.constraint(loop),
    )
    before, after = (one.contender.spec for one in pair)
    if isinstance(before, ModelSpec) and isinstance(after, ModelSpec):  # corrections of users are not sent elsewhere
        comparison = replace(comparison, regression=ask_suite(loop, before, after, scorer, progress))
    subjects: dict[Role, Subject] = {
        "base": base.subject,
        "champion": pair[0].subject,
        "challenger": pair[1].subject,
    }
    return _record(loop, database, comparison, subjects)


def find_model(
    loop: LoopSettings, database: Database, text: str, log: Callable[[str], None], api_key_env: str | None = None
) -> NamedModel:
    """Return the model that a text names: a version, a challenger, a GGUF file, or an endpoint.

    Raises:
        ComparisonError: it is an URL without a model or with a password, or a file that does not exist.
        RegistryError: there is no such version, it is one of another loop, or its files were deleted or differ.
    """
    if text.startswith(("http://", "https://")):
        return NamedModel(_endpoint(text, api_key_env), Subject())
    path = Path(text).expanduser()
    if text.endswith(GGUF) or path.is_file():
        if not path.is_file():
            raise ComparisonError(f"the file {path} does not exist; correct the path of the GGUF")
        return NamedModel(Contender(path.name, ModelSpec(gguf=path.resolve())), Subject())
    of_loop = text.rpartition("@")[0]
    if of_loop not in {"", loop.name}:
        raise ComparisonError(
            f"{text} is a model of {of_loop}, and the benchmark is that of {loop.name}; compare models of one loop"
        )
    version = find_trained(database, text, loop.name)
    if version is None:
        name = f"{loop.name}@{BASE}"
        return NamedModel(Contender(name, ModelSpec(gguf=base_gguf(loop, log))), Subject(name))
    check_files(version)
    spec = ModelSpec(gguf=version.gguf_path, adapter=version.adapter_path)
    return NamedModel(Contender(version.name, spec), subject_of(version))


def _endpoint(text: str, api_key_env: str | None) -> Contender:
    url, model = urldefrag(text)
    if not model:
        raise ComparisonError(f"{text} names no model; expected the URL and the model, such as {ENDPOINT_EXAMPLE}")
    if "@" in urlsplit(url).netloc:
        raise ComparisonError(
            f"the URL of {urlsplit(url).hostname} contains a user or password, which would be stored; put the key into "
            "an environment variable and name it with --api-key-env"
        )
    try:
        server = UpstreamSettings(url=url, model=model, api_key_env=api_key_env)
    except ValidationError as error:
        raise ComparisonError(f"{text} is not an endpoint ({error}); expected such as {ENDPOINT_EXAMPLE}") from error
    return Contender(f"{model} at {urlsplit(url).netloc}", server)


def _check_one_key(pair: list[NamedModel], api_key_env: str | None) -> None:
    """Raise an error if a key was given for no endpoint, or would be sent to two servers."""
    if api_key_env is None:
        return
    servers = {
        urlsplit(one.contender.spec.url).netloc for one in pair if isinstance(one.contender.spec, UpstreamSettings)
    }
    if len(servers) != 1:
        raise ComparisonError(
            f"{api_key_env} is the key of one server, and {len(servers)} are compared; leave out --api-key-env, or "
            "compare with one endpoint"
        )


def _check_different(first: Contender, second: Contender) -> None:
    identities = []
    for one in (first, second):
        if isinstance(one.spec, UpstreamSettings):
            identities.append(f"{one.spec.url}#{one.spec.model}")
        else:
            adapter = hash_file_cached(one.spec.adapter) if one.spec.adapter else None
            identities.append(model_sha256(hash_file_cached(one.spec.gguf), adapter))
    if len(set(identities)) == 1:
        raise ComparisonError(f"{first.name} and {second.name} are the same model; name two different ones")


def _record(
    loop: LoopSettings, database: Database, comparison: Comparison, subjects: dict[Role, Subject]
) -> FinishedComparison:
    first, second = comparison.champion, comparison.challenger
    inputs = {
        "first": first.gguf_sha256,
        "second": second.gguf_sha256,
        "benchmark": comparison.benchmark_sha256,
        "settings": settings_hash(loop),
    }
    scored_by = loop_files.scored_by(loop)
    hashes = {"settings": inputs["settings"]}
    facts = collect_facts(loop.name, database, comparison, subjects, hashes, scored_by, sealed_summary(loop, database))
    counts = {"wins": len(comparison.won), "losses": len(comparison.lost), "ties": comparison.ties}
    # Speed is measured again each time, so every comparison has its own report.
    version = version_of(inputs, {"made_at": datetime.now(UTC).isoformat()})
    with draft(loop.name, ManualReportManifest.stage, version) as folder:
        rules, threshold = loop_files.rules(loop), loop.curation.min_confidence
        write_report(folder, loop.name, comparison, None, loop.gate, threshold, rules, facts, scored_by=scored_by)
        fields = {
            "loop": loop.name,
            "version": version,
            "inputs": inputs,
            "settings": comparison_settings(loop),
            "packages": package_versions(*loop_files.PACKAGES),
            "first": first.name,
            "second": second.name,
            **counts,
        }
        report = publish(folder, ManualReportManifest, fields)
    record = ManualComparison(
        id=version,
        loop=loop.name,
        first=first.origin or first.name,
        first_sha256=first.gguf_sha256,
        second=second.origin or second.name,
        second_sha256=second.gguf_sha256,
        benchmark_sha256=comparison.benchmark_sha256,
        **counts,
        p_value=comparison.significance.p_value,
        report_path=report.path / HTML,
        created_at=report.manifest.created_at,
    )
    record_manual_comparison(database, record)
    return FinishedComparison(comparison, facts, threshold, loop.gate, report, record)
