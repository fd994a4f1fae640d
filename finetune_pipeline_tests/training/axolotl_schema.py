"""Run in Axolotl's own environment: check axolotl.yaml files against its schema, as `axolotl train` does first.

python axolotl_schema.py FILE ...: print a JSON list with, for each file, Axolotl's error, or null if it accepts the
file. Axolotl ignores unknown keys; here they are errors.
"""

import json
import sys
from pathlib import Path

import yaml
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import DPODataset, KTODataset, SFTDataset

# As on a machine with one H100.
GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
DATASETS = {None: SFTDataset, "dpo": DPODataset, "kto": KTODataset}


def unknown(config):
    yield from set(config) - set(AxolotlInputConfig.model_fields)
    known = set(DATASETS[config.get("rl")].model_fields)
    for name in ("datasets", "test_datasets"):
        for dataset in config[name]:
            yield from (f"{name}.{key}" for key in set(dataset) - known)


def problem(path):
    config = yaml.safe_load(Path(path).read_text())
    strange = sorted(unknown(config))
    if strange:
        return f"unknown: {', '.join(strange)}"
    sys.path.insert(0, str(Path(path).parent))  # of the plugin
    try:
        cfg = DictDefault(config)
        prepare_plugins(cfg)
        validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})
    except (ValueError, TypeError) as error:  # pydantic's is a ValueError
        return str(error)
    return None


print(json.dumps([problem(path) for path in sys.argv[1:]]))
