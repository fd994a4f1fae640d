"""Merge a LoRA adapter into the base's weights, in a child process.

The tokenizer files are the base's own, byte for byte: saved anew by transformers 5 they lose what llama.cpp's converter
needs, and the converted model answers garbage with no error.
"""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_pipeline.export.base import TOKENIZER_FILES
from finetune_pipeline.export.process import ExportError, run_step
from finetune_pipeline.export.reference import Questions, answer

_SMALL = 1_000_000_000


def merge(
    base_folder: Path, adapter_folder: Path, out_folder: Path | None, questions: Questions | None = None
) -> list[str]:
    """Write the merged model into `out_folder` as safetensors; what was there goes away.

    Up to 1e9 parameters it is merged and saved in float32, so that rounding happens once, in the conversion; above
    that in the base's own type, for memory's sake.

    Args:
        base_folder: the base model.
        adapter_folder: the trained adapter.
        out_folder: for the merged model; with None nothing is merged, only the questions are answered.
        questions: for the base with its adapter, before they are merged.

    Returns:
        The answers.

    Raises:
        ExportError: a folder is not what it should be, the merged weights hold a NaN, or memory does not suffice.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter_folder / name).is_file():
            raise ExportError(f"{adapter_folder} has no {name}, so it is no trained adapter; train it again")
    arguments = [str(base_folder), str(adapter_folder)]
    if out_folder is not None:
        shutil.rmtree(out_folder, ignore_errors=True)
        arguments += ["--out", str(out_folder)]
    with TemporaryDirectory() as folder:
        asked, answers = Path(folder) / "questions.json", Path(folder) / "answers.json"
        if questions is not None:
            questions.write(asked)
            arguments += ["--questions", str(asked), "--answers", str(answers)]
        run_step("merge", arguments, f"merging {adapter_folder} into {base_folder}")
        said: list[str] = json.loads(answers.read_text(encoding="utf-8")) if questions is not None else []
    return said


def merge_here(
    base_folder: Path,
    adapter_folder: Path,
    out_folder: Path | None,
    questions: Path | None = None,
    answers: Path | None = None,
) -> None:
    """Merge in this process, with questions and answers in files; loads torch, transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind: Any = "float32" if parameters(base_folder) <= _SMALL else "auto"
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=kind, use_safetensors=True, trust_remote_code=False, low_cpu_mem_usage=True
    )
    model = PeftModel.from_pretrained(base, adapter_folder, use_safetensors=True)
    _refuse_tied(base)
    if questions is not None and answers is not None:
        answer(base.eval(), base_folder, questions, answers)
    if out_folder is None:
        return
    merged = model.merge_and_unload(safe_merge=True)  # safe: a NaN is an error
    merged.save_pretrained(out_folder)
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, out_folder / name)


def _refuse_tied(model: Any) -> None:
    """Refuse LoRA on tied embeddings or their output layer: it would be merged into both."""
    from peft.tuners.lora import LoraLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[1] is not None and ends[0].weight is ends[1].weight and any(isinstance(end, LoraLayer) for end in ends):
        raise SystemExit(
            "the adapter changes the output layer or the embeddings, which share one weight in this base model "
            "(tie_word_embeddings), so the merged model would differ from the trained one; train again without them "
            "in target_modules"
        )


def parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files, by their headers alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
