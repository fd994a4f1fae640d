"""Stored results of an exported model's checks."""

import json

from finetune_pipeline.artifacts import Artifact, draft, publish
from finetune_pipeline.manifests import GgufManifest
from finetune_pipeline.pipeline.export import CHECKS, ModelCheck, read_checks


def artifact_with(checks: list[dict[str, object]]) -> Artifact[GgufManifest]:
    fields = {
        "loop": "notes", "version": "v", "inputs": {}, "settings": {}, "packages": {}, "gguf": CHECKS,
        "quantization": "F16", "base_model": "b", "base_hash": "b", "adapter_version": "a", "mode": "full",
        "watermark": 1,
    }  # fmt: skip
    with draft("notes", "gguf_model", "v") as folder:
        (folder / CHECKS).write_text(json.dumps(checks))
        return publish(folder, GgufManifest, fields)


def test_stored_check_results_are_read(own_home):
    check = {"name": "loads_and_answers", "passed": True, "metrics": {"answered": 1}}
    assert read_checks(artifact_with([check])) == [ModelCheck("loads_and_answers", True, {"answered": 1})]


def test_check_results_of_an_earlier_version_do_not_count(own_home):
    assert read_checks(artifact_with([{"name": "loads_and_answers", "passed": True, "figures": {}}])) == []
