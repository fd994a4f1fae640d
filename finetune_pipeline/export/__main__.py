"""python -m finetune_pipeline.export merge|quantize ...: the steps of an export that run in a child process."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one step and return the exit status."""
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
    options = parser.parse_args(arguments)
    if options.step == "merge":
        from finetune_pipeline.export.merge import merge_here

        merge_here(options.base, options.adapter, options.out, options.prompts, options.answers)
        return 0
    from finetune_pipeline.export.gguf import quantize_here

    return quantize_here(options.source, options.out, options.type)


if __name__ == "__main__":
    sys.exit(main())
