"""Errors of the loop through Dagster's command line: missing and invalid files, a full disk."""

import subprocess

import pytest

from finetune_pipeline_tests.orchestration.whole_loop.example_loop import Loop


def test_a_missing_base_model_is_named(loop):
    code, log = loop.run("*meeting_notes/lora_adapter", base_model="data/no_such_model")
    assert code != 0
    assert "data/no_such_model" in log


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no questions"), ('{"id": "a"}\n', "slice"), ("not json\n", "not JSON")],
    ids=["empty", "fields missing", "no JSON"],
)
def test_an_invalid_benchmark_is_named(loop, tmp_path, text, said):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    code, log = loop.run("*meeting_notes/curated_dataset", evaluation={"benchmark": str(bad), "metric": "rouge1"})
    assert code != 0
    assert str(bad) in log and said in log


@pytest.mark.parametrize("megabytes", [3, 12], ids=["while training", "while merging"])
def test_a_full_disk_is_reported_and_the_next_run_resumes(tmp_path, megabytes):
    small = Loop(tmp_path)
    small.home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(small.home)]
    refused = subprocess.run(mount, capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"only root can mount a small file system here: {refused.stderr.strip()}")
    training = {"num_train_epochs": 0.2, "learning_rate": 2e-3, "max_length": 256, "save_steps": 500}
    try:
        code, log = small.run("*meeting_notes/gguf_model", training=training)
        assert code != 0
        assert "the disk is full" in log and "ree some space" in log
        assert small.complete("curated_dataset") and not small.complete("gguf_model")
        subprocess.run(["mount", "-o", "remount,size=200m", str(small.home)], check=True)
        code, log = small.run("*meeting_notes/gguf_model", training=training)
        assert code == 0, log
    finally:
        subprocess.run(["umount", "-l", str(small.home)], check=True)
