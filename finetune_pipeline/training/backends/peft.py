"""TRL and PEFT in this environment: the backend that works everywhere."""

from collections.abc import Iterator

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends.base import Availability, TrainingBackend, has_nvidia, missing, versions
from finetune_pipeline.training.job import JobConfig, TrainingResult


class Peft(TrainingBackend):
    """TRL's trainers over PEFT, on a CPU or on GPUs."""

    name = "peft"

    def check(self) -> Availability:  # noqa: D102
        absent = missing("torch", "transformers", "trl", "peft", "datasets")
        if absent:
            return Availability("peft", False, f"not installed: {', '.join(absent)}", 'run "make setup"')
        device = "a GPU" if has_nvidia() else "the CPU"
        return Availability("peft", True, f"{versions('torch', 'transformers', 'trl', 'peft')}; trains on {device}")

    def unsupported(self, settings: TrainingSettings) -> Iterator[str]:  # noqa: D102
        qlora = check_qlora()
        if settings.adapter == "qlora" and not qlora.available:
            yield f"adapter: qlora ({qlora.why}); {qlora.remedy}, or set adapter: lora"
        if settings.attn_implementation == "flash_attention_2":
            if not has_nvidia() or missing("flash_attn"):
                why = "an NVIDIA GPU" if not has_nvidia() else "the package flash-attn (pip install flash-attn)"
                yield f"attn_implementation: flash_attention_2 needs {why}; or leave attn_implementation out"
            if not settings.bf16:
                yield "attn_implementation: flash_attention_2 computes in bfloat16; set bf16: true, or leave it out"

    def run(self, job: JobConfig, started: float, micro_batch: int | None = None) -> TrainingResult:  # noqa: D102
        from finetune_pipeline.training.trainer import run_training

        return run_training(job, started, micro_batch)


def check_qlora() -> Availability:
    """Return whether peft can train over 4-bit weights here."""
    peft = Peft().check()
    if not peft.available:
        return Availability("qlora", False, peft.why, peft.remedy)
    if missing("bitsandbytes"):
        return Availability("qlora", False, "not installed: bitsandbytes", "pip install bitsandbytes (not for macOS)")
    speed = "" if has_nvidia() else "; without a GPU it works but is slow, for tests only"
    return Availability("qlora", True, f"{versions('bitsandbytes')}{speed}")
