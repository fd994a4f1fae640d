"""The asset gguf_model: the GGUF that would serve, with its checks."""

from typing import Any

import dagster as dg

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.export.base import base_stamp
from finetune_pipeline.manifests import AdapterManifest, GgufManifest
from finetune_pipeline.orchestration.checks import check_specs, gguf_model_results
from finetune_pipeline.orchestration.job_steps import job_step, note_checks
from finetune_pipeline.orchestration.resources import loop_asset, materialized
from finetune_pipeline.pipeline.export import export_model, gguf_identity
from finetune_pipeline.settings import LoopSettings


def gguf_model_asset(loop: LoopSettings) -> dg.AssetsDefinition:
    """Return the asset gguf_model of a loop, with its checks."""

    @loop_asset(
        loop,
        GgufManifest,
        "lora_adapter",
        depends_on=(base_stamp(loop.base_model), loop.export),
        check_specs=check_specs(loop, GgufManifest.stage),
        kinds={"gguf"},
    )
    def gguf_model(context: dg.AssetExecutionContext, lora_adapter: Artifact[AdapterManifest]) -> dg.MaterializeResult:  # type: ignore[type-arg]  # with checks, Dagster takes no type argument
        """The GGUF that would serve: the adapter merged into the base model, converted by llama.cpp and quantized.

        With `export.form: adapter` it is the converted adapter alone, for the base model's GGUF.

        If a check is red: llama.cpp does not load this model (loads_and_answers) or tokenizes prompts differently from
        training (tokenizer_parity), so update llama.cpp or change base_model. The checks agreement and
        score_equivalence compare the answers with those of the unmerged adapter in transformers: try a larger
        export.quantization, or a larger export.agreement_sample if equivalence is undecided.
        """
        with job_step(loop, context) as step:
            artifact, checks = export_model(step.loop, lora_adapter, context.run.run_id, context.log.info)
            step.made(f"exported the model {artifact.manifest.version}", model_sha256=gguf_identity(artifact))
        results = gguf_model_results(loop, checks)
        note_checks(context.run.run_id, results)
        return materialized(artifact, _metadata(artifact), results)

    return gguf_model


def _metadata(artifact: Artifact[GgufManifest]) -> dict[str, Any]:
    manifest = artifact.manifest
    file = manifest.files[manifest.gguf]
    return {
        "size (MB)": round(file.size / 1e6, 1),
        "quantization": manifest.quantization,
        "form": "one GGUF" if manifest.form == "merged" else "an adapter for the base model's GGUF",
        "mode": manifest.mode,
        "file": manifest.gguf,
        "SHA-256": file.sha256[:16],
    }
