"""Merge a LoRA adapter into the base's weights, in a child process.

The tokenizer files are the base's own, byte for byte. Saved again by transformers 5, they lose what llama.cpp's
converter needs, and the converted model generates garbage without any error.
"""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_pipeline.export.process import ExportError, run_step
from finetune_pipeline.export.reference import ReferencePrompts, generate_answers
from finetune_pipeline.manifests import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES

FLOAT32_LIMIT = 1_000_000_000
"""Parameters up to which a model is merged in float32."""


def merge(
    base_folder: Path, adapter_folder: Path, out_folder: Path | None, prompts: ReferencePrompts | None = None
) -> list[str]:
    """Write the merged model into `out_folder` as safetensors, replacing the folder.

    Up to 1e9 parameters the model is merged and saved in float32, so that weights are rounded only once, in the
    conversion. Above that it is merged in the base's own type, to save memory.

    Args:
        base_folder: the base model.
        adapter_folder: the trained adapter.
        out_folder: folder for the merged model; None to only generate answers.
        prompts: prompts for the base with its adapter, before merging.

    Returns:
        The answers to the prompts.

    Raises:
        ExportError: a folder is not a model or adapter, the merged weights contain NaN, or memory does not suffice.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter_folder / name).is_file():
            raise ExportError(f"{adapter_folder} has no {name}, so it is not a trained adapter; train it again")
    arguments = [str(base_folder), str(adapter_folder)]
    if out_folder is not None:
        shutil.rmtree(out_folder, ignore_errors=True)
        arguments += ["--out", str(out_folder)]
    with TemporaryDirectory() as folder:
        prompts_file, answers_file = Path(folder) / "prompts.json", Path(folder) / "answers.json"
        if prompts is not None:
            prompts.write(prompts_file)
            arguments += ["--prompts", str(prompts_file), "--answers", str(answers_file)]
        run_step("merge", arguments, f"merging {adapter_folder} into {base_folder}")
        answers: list[str] = json.loads(answers_file.read_text(encoding="utf-8")) if prompts is not None else []
    return answers


def merge_here(
    base_folder: Path,
    adapter_folder: Path,
    out_folder: Path | None,
    prompts_file: Path | None = None,
    answers_file: Path | None = None,
) -> None:
    """Merge in this process, with prompts and answers in files; loads torch, transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype: Any = "float32" if count_parameters(base_folder) <= FLOAT32_LIMIT else "auto"
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, low_cpu_mem_usage=True
    )
    model = PeftModel.from_pretrained(base, adapter_folder, use_safetensors=True)
    _refuse_tied(base)
    if prompts_file is not None and answers_file is not None:
        generate_answers(base.eval(), base_folder, prompts_file, answers_file)
    if out_folder is None:
        return
    merged = model.merge_and_unload(safe_merge=True)  # safe: NaN is an error
    merged.save_pretrained(out_folder)
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, out_folder / name)


def _refuse_tied(model: Any) -> None:
    """Raise an error if LoRA is on tied embeddings or their output layer: it would be merged into both."""
    from peft.tuners.lora import LoraLayer

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embeddings.weight is head.weight
    if tied and any(isinstance(layer, LoraLayer) for layer in (embeddings, head)):
        raise SystemExit(
            "the adapter changes the output layer or the embeddings, which share one weight in this base model "
            "(tie_word_embeddings), so the merged model would differ from the trained one; train again without them "
            "in target_modules"
        )


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
