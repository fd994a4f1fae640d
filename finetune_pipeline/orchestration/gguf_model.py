"""The asset gguf_model: the trained model as the one file, or the pair, that would serve, and proof that it does."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import (
    Artifact,
    ArtifactError,
    check_content,
    get_or_create,
    model_sha256,
    package_versions,
    read,
    stage_folder,
    version_of,
    write_text,
)
from finetune_pipeline.database import connect
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf_artifact
from finetune_pipeline.export.model import ExportedModel, export, export_adapter
from finetune_pipeline.export.parity import agreement, tokenizer_parity
from finetune_pipeline.export.reference import Questions
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.manifests import AdapterManifest, BaseGgufManifest, GgufManifest
from finetune_pipeline.orchestration.io_manager import pointers_key, upstream
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import chat_messages
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.subprocess_lifetime import die_with_run

CHECKS = "checks.json"
NAMED = 5
BLOCKING = GgufManifest.blocking_checks


@dataclass(frozen=True)
class Outcome:
    """What one check found; kept with the artifact."""

    name: str
    passed: bool
    figures: dict[str, Any]


def gguf_model_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """The asset gguf_model of a loop, with its checks."""
    descriptions = {
        "loads_and_answers": "What would serve loads in the engine's own process and answers.",
        "tokenizer_parity": "The engine reads the rendered chat template as the tokens that training used.",
        "agreement": f"At least {loop.export.min_agreement:.0%} of answers are those of the base with its adapter, "
        "unmerged and unquantized.",
    }

    @dg.asset(
        key_prefix=loop.prefix or None,
        group_name=loop.name,
        io_manager_key=pointers_key(loop),
        ins={"lora_adapter": upstream(loop)},
        check_specs=[
            dg.AssetCheckSpec(name, asset=[*loop.prefix, "gguf_model"], description=text, blocking=name in BLOCKING)
            for name, text in descriptions.items()
        ],
        kinds={"gguf"},
    )
    def gguf_model(
        context: dg.AssetExecutionContext, lora_adapter: Artifact[AdapterManifest]
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        """The model that would serve: adapter merged into the base, converted by llama.cpp, quantized.

        With `export.form: adapter` the adapter alone is converted, and serves over the base's own GGUF. The checks run
        on exactly what serves. Its answers are compared with those of the base with its adapter in transformers, which
        shows errors of the merge and the conversion as well as the cost of quantization.
        """
        die_with_run()
        artifact = model(loop, lora_adapter, context.log.info)
        outcomes = _kept_outcomes(artifact.path)
        record_outcomes(connect(), artifact, {one.name: one.passed for one in outcomes}, context.run.run_id)
        yield dg.MaterializeResult(value=artifact, metadata=_metadata(artifact))
        for outcome in outcomes:
            severity = dg.AssetCheckSeverity.ERROR if outcome.name in BLOCKING else dg.AssetCheckSeverity.WARN
            passed = outcome.passed
            if "share" in outcome.figures:  # what was found is kept, what is asked for may have changed since
                passed = outcome.figures["share"] >= loop.export.min_agreement
            yield dg.AssetCheckResult(
                check_name=outcome.name, passed=passed, severity=severity, metadata=outcome.figures
            )

    return gguf_model


def model(
    loop: LoopSettings, adapter: Artifact[AdapterManifest], tell: Callable[[str], None]
) -> Artifact[GgufManifest]:
    """The GGUF of an adapter, made and checked if it is not there yet, or did not pass when it was made.

    Raises:
        ArtifactError: the base model is no longer the one that the adapter was trained on.
    """
    base = resolve_base_model(loop.base_model)
    if base_hash(base) != adapter.manifest.base_hash:
        raise ArtifactError(
            f"the adapter {adapter.manifest.version} was trained on another base model ({adapter.manifest.base_model}) "
            f"than {base} is now; materialize lora_adapter again, or set base_model back"
        )
    below = base_gguf_artifact(loop, tell) if loop.export.form == "adapter" else None
    inputs = {"lora_adapter": adapter.manifest.version, "base_model": adapter.manifest.base_hash}
    settings = {"quantization": loop.export.quantization, **package_versions("llama_cpp_python")}
    if below:
        inputs["base_gguf"] = below.manifest.version
        settings["form"] = "adapter"

    def make(folder: Path) -> dict[str, Any]:
        exported = _export(loop, base, adapter.path / "adapter", below, folder, tell)
        tell("checking it in the engine")
        outcomes = check(loop, base, exported)
        if exported.full != exported.gguf:
            exported.full.unlink()  # it can be made again from the adapter
        write_text(folder / CHECKS, json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
        return {
            "inputs": inputs,
            "settings": settings,
            "packages": package_versions(*loop_files.PACKAGES),
            **_files(exported, below),
            "quantization": loop.export.quantization,
            "base_model": str(base),
            "base_hash": adapter.manifest.base_hash,
            "adapter_version": adapter.manifest.version,
            "mode": adapter.manifest.mode,
            "datasets": adapter.manifest.datasets,
            "watermark": adapter.manifest.watermark,
        }

    def passed(found: Artifact[GgufManifest]) -> bool:
        if below and found.manifest.base_gguf_sha256 != _sha256(below):
            return False  # the base's file was made again and is another
        return all(outcome.passed for outcome in _kept_outcomes(found.path) if outcome.name in BLOCKING)

    return get_or_create(GgufManifest, loop.name, version_of(inputs, settings), make, usable=passed)


def _export(
    loop: LoopSettings,
    base: Path,
    adapter: Path,
    below: Artifact[BaseGgufManifest] | None,
    folder: Path,
    tell: Callable[[str], None],
) -> ExportedModel:
    kind, chats = loop.export.quantization, [chat_messages(loop.system_prompt, prompt) for prompt in _sample(loop)]
    questions = Questions(chats, loop.evaluation.max_tokens)
    if below is None:
        return export(base, adapter, folder, kind, tell, questions)
    return export_adapter(base, adapter, below.path / below.manifest.gguf, folder, kind, tell, questions)


def _sample(loop: LoopSettings) -> list[str]:
    """Return the prompts for the comparison of answers, spread over the benchmark."""
    questions = loop_files.benchmark(loop).questions
    step = max(1, len(questions) // loop.export.agreement_sample)
    return [question.prompt for question in questions[::step]][: loop.export.agreement_sample]


def _files(exported: ExportedModel, below: Artifact[BaseGgufManifest] | None) -> dict[str, Any]:
    if below is None or exported.adapter is None:
        return {"gguf": exported.gguf.name}
    return {"form": "adapter", "gguf": exported.adapter.name, "base_gguf_sha256": _sha256(below)}


def _sha256(below: Artifact[BaseGgufManifest]) -> str:
    return below.manifest.files[below.manifest.gguf].sha256


def what_serves(artifact: Artifact[GgufManifest]) -> ModelSpec:
    """The file of a gguf_model, or the base's GGUF with the adapter.

    Raises:
        ArtifactError: the base's GGUF is gone, damaged, or another than the adapter was checked with.
    """
    manifest = artifact.manifest
    file = artifact.path / manifest.gguf
    if manifest.form == "merged":
        return ModelSpec(gguf=file)
    folder = stage_folder(manifest.loop, BaseGgufManifest.stage) / manifest.inputs["base_gguf"]
    remedy = "materialize gguf_model again: it makes the base's file too"
    try:
        below = read(BaseGgufManifest, folder)
    except ArtifactError as error:
        raise ArtifactError(f"the base that {file} goes over is not there ({error}); {remedy}") from error
    if _sha256(below) != manifest.base_gguf_sha256:
        raise ArtifactError(f"the base in {folder} was made again and is not what {file} was checked with; {remedy}")
    gguf = below.path / below.manifest.gguf
    check_content(gguf, manifest.base_gguf_sha256, remedy)
    return ModelSpec(gguf=gguf, adapter=file)


def identity(artifact: Artifact[GgufManifest]) -> str:
    """Return the SHA-256 of the file that would serve, or the identity of the pair, according to its manifest."""
    manifest = artifact.manifest
    sha256 = manifest.files[manifest.gguf].sha256
    return sha256 if manifest.base_gguf_sha256 is None else model_sha256(manifest.base_gguf_sha256, sha256)


def check(loop: LoopSettings, base: Path, exported: ExportedModel) -> list[Outcome]:
    """Try what would serve in the engine. A crash there is a failed check with the crash's name, never a dead run."""
    prompts = _sample(loop)
    try:
        with _engine(loop, exported.gguf, exported.adapter) as engine:
            parity = tokenizer_parity(base, engine, [chat_messages(loop.system_prompt, prompt) for prompt in prompts])
            answers = _answers(loop, engine, prompts)
            about = {"engine": engine.info.build, "parameters": engine.info.n_params}
    except EngineError as error:
        nothing = {"what happened": "not asked: the model does not run"}
        return [
            Outcome("loads_and_answers", False, {"error": f"{type(error).__name__}: {error}"}),
            Outcome("tokenizer_parity", False, nothing),
            Outcome("agreement", False, nothing),
        ]
    misread = [difference.text for difference in parity.offenders[:NAMED]]
    answered = sum(bool(answer.strip()) for answer in answers)
    return [
        Outcome("loads_and_answers", answered > 0, {"answered": answered, "asked": len(prompts), **about}),
        Outcome("tokenizer_parity", parity.same, {"prompts": parity.checked, "offenders": misread}),
        _agreement(loop, exported, prompts, answers),
    ]


def _agreement(loop: LoopSettings, exported: ExportedModel, prompts: Sequence[str], answers: Sequence[str]) -> Outcome:
    result = agreement(exported.reference, answers)
    offenders = [prompts[place] for place in result.offenders[:NAMED]]
    figures = {"share": result.share, "same": result.same, "of": result.total, "offenders": offenders}
    return Outcome("agreement", result.share >= loop.export.min_agreement, figures)


def _engine(loop: LoopSettings, gguf: Path, adapter: Path | None = None) -> Engine:
    settings = loop.evaluation
    return Engine(ModelSpec(gguf=gguf, adapter=adapter, context=settings.context, parallel=settings.parallel))


def _answers(loop: LoopSettings, engine: Engine, prompts: Sequence[str]) -> list[str]:
    requests = [
        GenerateRequest(messages=chat_messages(loop.system_prompt, prompt), max_tokens=loop.evaluation.max_tokens)
        for prompt in prompts
    ]
    return [completion.text for completion in engine.generate(requests)]


def _kept_outcomes(folder: Path) -> list[Outcome]:
    return [Outcome(**document) for document in json.loads((folder / CHECKS).read_text(encoding="utf-8"))]


def _metadata(artifact: Artifact[GgufManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    file = manifest.files[manifest.gguf]
    spec = what_serves(artifact)
    base = {"base_gguf": dg.MetadataValue.path(spec.gguf)} if spec.adapter else {}
    return {
        "size_mb": file.size / 1e6,
        "form": manifest.form,
        "quantization": manifest.quantization,
        "sha256": file.sha256,
        "version": manifest.version,
        "path": dg.MetadataValue.path(artifact.path / manifest.gguf),
        **base,
    }
