"""Export an adapter as the GGUF that would serve, and check it in the engine."""

import json
from collections import Counter
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
from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.equivalence import Equivalence, ScoreDifferences, score_differences
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf_artifact
from finetune_pipeline.export.model import ADAPTER, ExportedModel, export, export_adapter
from finetune_pipeline.export.parity import TokenParity, compare_answers, tokenizer_parity
from finetune_pipeline.export.reference import ReferencePrompts
from finetune_pipeline.export.special_tokens import FORM
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.manifests import AdapterManifest, BaseGgufManifest, GgufManifest, ParityRecord
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.settings import LoopSettings

CHECKS = "checks.json"
CHECK_NAMES = ("loads_and_answers", "tokenizer_parity", "agreement", "score_equivalence")
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
    packages = package_versions("llama_cpp_python")
    kind = base_gguf.manifest.quantization if base_gguf else loop.export.quantization
    settings = {"quantization": kind, "special_tokens": FORM, **packages}
    if base_gguf:
        inputs["base_gguf"] = base_gguf.manifest.version
        settings["form"] = "adapter"

    def make(folder: Path) -> dict[str, Any]:
        adapter_folder = adapter.path / "adapter"
        chats = [question.messages(loop.system_prompt) for question in _sample(loop)]
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
            "parity": _parity(loop, checks),
            "watermark": adapter.manifest.watermark,
        }

    def usable(found: Artifact[GgufManifest]) -> bool:
        if base_gguf and found.manifest.base_gguf_sha256 != _sha256(base_gguf):
            return False  # the base's GGUF was made again and differs
        stored = read_checks(found)
        passed = {check.name for check in stored if check.passed}
        # An earlier version of this project made fewer checks.
        return passed >= set(GgufManifest.blocking_checks) and {check.name for check in stored} >= set(CHECK_NAMES)

    artifact = get_or_create(GgufManifest, loop.name, version_of(inputs, settings), make, usable=usable)
    checks = read_checks(artifact)
    record_outcomes(connect(), artifact, {check.name: check.passed for check in checks}, run_id)
    return artifact, [judge_check(loop, check) for check in checks]


def judge_check(loop: LoopSettings, check: ModelCheck) -> ModelCheck:
    """Return a stored check with the result by the loop's settings, which may have changed since it was measured."""
    if "fraction" in check.metrics:
        return ModelCheck(check.name, check.metrics["fraction"] >= loop.export.min_agreement, check.metrics)
    if "difference" in check.metrics:
        return ModelCheck(check.name, score_equivalence(loop, check).tolerable, check.metrics)
    return check


def score_equivalence(loop: LoopSettings, check: ModelCheck) -> Equivalence:
    """Return the test of a stored score_equivalence check, with the loop's margin."""
    metrics = check.metrics
    measured = ScoreDifferences(metrics["prompts"], metrics["difference"], metrics["deviation"])
    return Equivalence(measured, loop.export.equivalence_margin)


def check_model(loop: LoopSettings, base: Path, exported: ExportedModel) -> list[ModelCheck]:
    """Run the checks of an exported model in the engine. A crash of the engine is a failed check, not an error."""
    questions, settings = _sample(loop), loop.evaluation
    chats = [question.messages(loop.system_prompt) for question in questions]
    spec = ModelSpec(gguf=exported.gguf, adapter=exported.adapter, context=settings.context, parallel=settings.parallel)
    try:
        with Engine(spec) as engine:
            tokens = tokenizer_parity(base, engine, loop.system_prompt, chats)
            requests = [GenerateRequest(messages=messages, max_tokens=settings.max_tokens) for messages in chats]
            answers = [completion.text for completion in engine.generate(requests)]
            build: dict[str, Any] = {"engine": engine.info.build, "parameters": engine.info.n_params}
            if engine.info.own_ends:
                build["ends_unknown_to_other_servers"] = engine.info.own_ends
    except EngineError as error:
        crashed, *others = CHECK_NAMES
        return [
            ModelCheck(crashed, False, {"error": f"{type(error).__name__}: {error}"}),
            *(ModelCheck(name, False, {"skipped": "the model does not run"}) for name in others),
        ]
    answered = sum(bool(answer.strip()) for answer in answers)
    agreement = compare_answers(exported.reference, answers)
    agreement_metrics = {
        "fraction": agreement.fraction,
        "same": agreement.same,
        "total": agreement.total,
        "offenders": [questions[index].prompt for index in agreement.offenders[:MAX_OFFENDERS]],
    }
    return [
        ModelCheck("loads_and_answers", answered > 0, {"answered": answered, "prompts": len(chats), **build}),
        ModelCheck("tokenizer_parity", not tokens.differences, _token_metrics(tokens)),
        judge_check(loop, ModelCheck("agreement", False, agreement_metrics)),
        judge_check(loop, ModelCheck("score_equivalence", False, _score_metrics(loop, questions, exported, answers))),
    ]


def _token_metrics(tokens: TokenParity) -> dict[str, Any]:
    return {
        "conversations": tokens.compared,
        "refused": tokens.refused,
        "differing": dict(Counter(difference.kind for difference in tokens.differences)),
        "offenders": [difference.text for difference in tokens.differences[:MAX_OFFENDERS]],
    }


def _score_metrics(
    loop: LoopSettings, questions: Sequence[BenchmarkQuestion], exported: ExportedModel, answers: Sequence[str]
) -> dict[str, Any]:
    """Score both models on the same questions, both without constrained decoding."""
    scorer = loop_files.scorer(loop)

    def scores(given: Sequence[str]) -> list[float]:
        found = (scorer.count(one, answer) for one, answer in zip(questions, given, strict=True))
        return [score.correct / score.total if score.total else 0.0 for score in found]

    reference, own = scores(exported.reference), scores(answers)
    measured = score_differences(reference, own)
    return {
        "prompts": measured.questions,
        "score": sum(own) / len(own),
        "reference_score": sum(reference) / len(reference),
        "difference": measured.mean,
        "deviation": measured.deviation,
    }


def _parity(loop: LoopSettings, checks: Sequence[ModelCheck]) -> ParityRecord | None:
    """Return the record of agreement and equivalence for the manifest."""
    by_name = {check.name: check for check in checks}
    agreement, scores = by_name["agreement"].metrics, by_name["score_equivalence"].metrics
    if "difference" not in scores:
        return None
    found = score_equivalence(loop, by_name["score_equivalence"])
    low, high = found.interval
    return ParityRecord(
        prompts=scores["prompts"],
        same=agreement["same"],
        score=scores["score"],
        reference_score=scores["reference_score"],
        deviation=scores["deviation"],
        margin=found.margin,
        p_value=found.p_value,
        interval_low=low,
        interval_high=high,
        equivalent=found.equivalent,
    )


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


def _sample(loop: LoopSettings) -> Sequence[BenchmarkQuestion]:
    """Return questions for the comparison of answers, spread over the benchmark."""
    questions = loop_files.benchmark(loop).questions
    count = min(loop.export.agreement_sample, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _sha256(base_gguf: Artifact[BaseGgufManifest]) -> str:
    return base_gguf.manifest.files[base_gguf.manifest.gguf].sha256
