"""Export an adapter as the GGUF that would serve, and check it in the engine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from finetune_pipeline.export.model import ADAPTER, ExportedModel, export, export_adapter
from finetune_pipeline.export.parity import compare_answers, tokenizer_parity
from finetune_pipeline.export.reference import ReferencePrompts
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.manifests import AdapterManifest, BaseGgufManifest, GgufManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import chat_messages
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.settings import LoopSettings

CHECKS = "checks.json"
MAX_OFFENDERS = 5


@dataclass(frozen=True)
class ModelCheck:
    """Result of one check of an exported model; stored in checks.json of its artifact."""

    name: str
    passed: bool
    metrics: dict[str, Any]


def export_model(
    loop: LoopSettings, adapter: Artifact[AdapterManifest], run_id: str, log: Callable[[str], None]
) -> tuple[Artifact[GgufManifest], list[ModelCheck]]:
    """Return the GGUF of an adapter with the results of its checks, and record the blocking ones in the database.

    An existing GGUF is reused if it passed its blocking checks.

    Raises:
        ArtifactError: the base model is not the one that the adapter was trained on.
        ExportError: merging, converting or quantizing failed.
    """
    base = resolve_base_model(loop.base_model)
    if base_hash(base) != adapter.manifest.base_hash:
        raise ArtifactError(
            f"the adapter {adapter.manifest.version} was trained on another base model ({adapter.manifest.base_model}) "
            f"than {base} is now; materialize lora_adapter again, or set base_model back"
        )
    base_gguf = base_gguf_artifact(loop, log) if loop.export.form == "adapter" else None
    inputs = {AdapterManifest.stage: adapter.manifest.version, "base_model": adapter.manifest.base_hash}
    settings = {"quantization": loop.export.quantization, **package_versions("llama_cpp_python")}
    if base_gguf:
        inputs["base_gguf"] = base_gguf.manifest.version
        settings["form"] = "adapter"

    def make(folder: Path) -> dict[str, Any]:
        kind, adapter_folder = loop.export.quantization, adapter.path / "adapter"
        chats = [chat_messages(loop.system_prompt, prompt) for prompt in _sample(loop)]
        prompts = ReferencePrompts(chats, loop.evaluation.max_tokens)
        if base_gguf is None:
            messages = {
                "merge": "merge the adapter into the base model",
                "convert": "convert the merged model to GGUF",
                "quantize": f"quantize the merged model to {kind}",
            }
            exported = export(base, adapter_folder, folder, kind, lambda step: log(messages[step]), prompts)
            files = {"gguf": exported.gguf.name}
        else:
            gguf = base_gguf.path / base_gguf.manifest.gguf
            exported = export_adapter(base, adapter_folder, gguf, folder, log, prompts)
            files = {"form": "adapter", "gguf": ADAPTER, "base_gguf_sha256": _sha256(base_gguf)}
        log("check the exported model in llama.cpp")
        checks = check_model(loop, base, exported)
        if exported.f16 != exported.gguf:
            exported.f16.unlink()  # it can be made again from the adapter
        write_text(folder / CHECKS, json.dumps([asdict(check) for check in checks], indent=2) + "\n")
        return {
            "inputs": inputs,
            "settings": settings,
            "packages": package_versions(*loop_files.PACKAGES),
            **files,
            "quantization": kind,
            "base_model": str(base),
            "base_hash": adapter.manifest.base_hash,
            "adapter_version": adapter.manifest.version,
            "mode": adapter.manifest.mode,
            "datasets": adapter.manifest.datasets,
            "watermark": adapter.manifest.watermark,
        }

    def usable(found: Artifact[GgufManifest]) -> bool:
        if base_gguf and found.manifest.base_gguf_sha256 != _sha256(base_gguf):
            return False  # the base's GGUF was made again and differs
        return {check.name for check in read_checks(found) if check.passed} >= set(GgufManifest.blocking_checks)

    artifact = get_or_create(GgufManifest, loop.name, version_of(inputs, settings), make, usable=usable)
    checks = read_checks(artifact)
    record_outcomes(connect(), artifact, {check.name: check.passed for check in checks}, run_id)
    # The measured agreement is stored; the required one may have changed since.
    return artifact, [
        ModelCheck(check.name, check.metrics["fraction"] >= loop.export.min_agreement, check.metrics)
        if "fraction" in check.metrics
        else check
        for check in checks
    ]


def check_model(loop: LoopSettings, base: Path, exported: ExportedModel) -> list[ModelCheck]:
    """Run the checks of an exported model in the engine. A crash of the engine is a failed check, not an error."""
    prompts, settings = _sample(loop), loop.evaluation
    chats = [chat_messages(loop.system_prompt, prompt) for prompt in prompts]
    spec = ModelSpec(gguf=exported.gguf, adapter=exported.adapter, context=settings.context, parallel=settings.parallel)
    try:
        with Engine(spec) as engine:
            differing = tokenizer_parity(base, engine, chats)
            requests = [GenerateRequest(messages=messages, max_tokens=settings.max_tokens) for messages in chats]
            answers = [completion.text for completion in engine.generate(requests)]
            build = {"engine": engine.info.build, "parameters": engine.info.n_params}
    except EngineError as error:
        skipped = {"skipped": "the model does not run"}
        return [
            ModelCheck("loads_and_answers", False, {"error": f"{type(error).__name__}: {error}"}),
            ModelCheck("tokenizer_parity", False, skipped),
            ModelCheck("agreement", False, skipped),
        ]
    answered = sum(bool(answer.strip()) for answer in answers)
    differing_chats = [difference.text for difference in differing[:MAX_OFFENDERS]]
    agreement = compare_answers(exported.reference, answers)
    agreement_metrics = {
        "fraction": agreement.fraction,
        "same": agreement.same,
        "total": agreement.total,
        "offenders": [prompts[index] for index in agreement.offenders[:MAX_OFFENDERS]],
    }
    return [
        ModelCheck("loads_and_answers", answered > 0, {"answered": answered, "prompts": len(prompts), **build}),
        ModelCheck("tokenizer_parity", not differing, {"prompts": len(chats), "offenders": differing_chats}),
        ModelCheck("agreement", agreement.fraction >= loop.export.min_agreement, agreement_metrics),
    ]


def read_checks(artifact: Artifact[GgufManifest]) -> list[ModelCheck]:
    """Return the stored results of an artifact's checks; none if another version of this project wrote them."""
    try:
        return [ModelCheck(**check) for check in json.loads((artifact.path / CHECKS).read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        return []


def model_spec(artifact: Artifact[GgufManifest]) -> ModelSpec:
    """Return the file of a gguf_model, or the base's GGUF with the adapter.

    Raises:
        ArtifactError: the base's GGUF is missing, damaged, or not the one that the adapter was checked with.
    """
    manifest = artifact.manifest
    file = artifact.path / manifest.gguf
    if manifest.form == "merged":
        return ModelSpec(gguf=file)
    folder = stage_folder(manifest.loop, BaseGgufManifest.stage) / manifest.inputs["base_gguf"]
    remedy = "materialize gguf_model again: it makes the base's GGUF too"
    try:
        base_gguf = read(BaseGgufManifest, folder)
    except ArtifactError as error:
        raise ArtifactError(f"the base's GGUF of the adapter {file} is not usable ({error}); {remedy}") from error
    if _sha256(base_gguf) != manifest.base_gguf_sha256:
        raise ArtifactError(f"the base's GGUF in {folder} is not the one that {file} was checked with; {remedy}")
    gguf = base_gguf.path / base_gguf.manifest.gguf
    check_content(gguf, manifest.base_gguf_sha256, remedy)
    return ModelSpec(gguf=gguf, adapter=file)


def gguf_identity(artifact: Artifact[GgufManifest]) -> str:
    """Return the SHA-256 of the GGUF that would serve, or the combined one of base and adapter, from its manifest."""
    manifest = artifact.manifest
    sha256 = manifest.files[manifest.gguf].sha256
    return sha256 if manifest.base_gguf_sha256 is None else model_sha256(manifest.base_gguf_sha256, sha256)


def _sample(loop: LoopSettings) -> Sequence[str]:
    """Return prompts for the comparison of answers, spread over the benchmark."""
    questions = loop_files.benchmark(loop).questions
    step = max(1, len(questions) // loop.export.agreement_sample)
    return [question.prompt for question in questions[::step]][: loop.export.agreement_sample]


def _sha256(base_gguf: Artifact[BaseGgufManifest]) -> str:
    return base_gguf.manifest.files[base_gguf.manifest.gguf].sha256
