"""python -m finetune_pipeline.export merge|convert|quantize|check|dequantize ...: steps that run in a child process."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one step and return the exit status."""
    # Where scikit-learn is installed, transformers imports it for a generation method that is not used here: two of the
    # eight seconds of a small conversion.
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(prog="python -m finetune_pipeline.export", description="Run a step of an export.")
    steps = parser.add_subparsers(dest="step", required=True)
    merge = steps.add_parser("merge", help="merge a LoRA adapter into the base's weights")
    merge.add_argument("base", type=Path)
    merge.add_argument("adapter", type=Path)
    merge.add_argument("--out", type=Path, help="folder for the merged model; without it nothing is merged")
    merge.add_argument("--prompts", type=Path, help="JSON file of prompts for the base with its unmerged adapter")
    merge.add_argument("--answers", type=Path, help="JSON file to write its answers to")
    quantize = steps.add_parser("quantize", help="convert a GGUF to another type")
    quantize.add_argument("source", type=Path)
    quantize.add_argument("out", type=Path)
    quantize.add_argument("type")
    convert = steps.add_parser("convert", help="convert a model to GGUF")
    convert.add_argument("base", type=Path, help="the base model, for its special tokens")
    convert.add_argument("script", type=Path, help="llama.cpp's converter")
    convert.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the converter")
    check = steps.add_parser("check", help="check a base model's tokenizer and chat template")
    check.add_argument("base", type=Path)
    check.add_argument("script", type=Path, help="llama.cpp's converter")
    check.add_argument("folder", type=Path, help="holds the staged model and the request; gets the problems")
    dequantize = steps.add_parser("dequantize", help="read a base model from a GGUF")
    dequantize.add_argument("gguf", type=Path)
    dequantize.add_argument("folder", type=Path, help="gets the model in Hugging Face's layout, or the problem")
    options = parser.parse_args(arguments)
    if options.step == "merge":
        from finetune_pipeline.export.merge import merge_here

        merge_here(options.base, options.adapter, options.out, options.prompts, options.answers)
        return 0
    if options.step == "convert":
        from finetune_pipeline.export.gguf import convert_here

        convert_here(options.base, options.script, options.arguments)
        return 0
    if options.step == "check":
        from finetune_pipeline.export.base_check import check_here

        check_here(options.base, options.script, options.folder)
        return 0
    if options.step == "dequantize":
        from finetune_pipeline.export.gguf_base import dequantize_here

        dequantize_here(options.gguf, options.folder)
        return 0
    from finetune_pipeline.export.gguf import quantize_here

    return quantize_here(options.source, options.out, options.type)


if __name__ == "__main__":
    sys.exit(main())
