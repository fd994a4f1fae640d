"""benchmarks/gpu.sh where there is no GPU: the tiny shape is trained on the CPU, and it says so."""

import json
import sys

import pytest

from benchmarks import gpu, results


@pytest.mark.slow
def test_without_a_gpu_the_tiny_shape_is_trained_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.sh", "--steps", "2"])
    gpu.main()
    assert "the GPU part was not run" in capsys.readouterr().out
    trainings = json.loads((tmp_path / "results" / "gpu.json").read_text())["trainings"]
    measured = [(row["adapter"], row["backend"]) for row in trainings if row.get("tokens_per_second", 0) > 0]
    assert measured == [("lora", "peft"), ("qlora", "peft"), ("lora", "plain TRL")]
