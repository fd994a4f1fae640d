"""`finetune init`, as people type it."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.pipeline.test_init_loop import JSON_ROWS, STARTER


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FINETUNE_LOOPS_DIR", raising=False)

    def invoke(*arguments):
        result = CliRunner().invoke(finetune, ["init", *arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output.splitlines()

    return invoke


def next_steps(lines):
    return [line.strip() for line in lines[lines.index("next:") + 1 :]]


def test_the_next_steps_without_a_folder_of_loops(run, tmp_path):
    lines = run("tickets")
    assert lines[0] == f"loop tickets written to {tmp_path}/loops/tickets"
    assert next_steps(lines) == [
        f"write rows and questions; {tmp_path}/loops/tickets/README.md shows how",
        f"export FINETUNE_LOOPS_DIR={tmp_path}/loops",
        "finetune check",
        "finetune run",
    ]


def test_the_next_steps_with_a_folder_of_loops_and_a_second_loop(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", "my loops")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, JSON_ROWS)))
    assert next_steps(run("tickets", "--data", "rows.jsonl", "--base", STARTER)) == ["finetune check", "finetune run"]
    assert next_steps(run("other"))[1:] == ["finetune check --loop other", "finetune run --loop other"]
    assert sorted(path.name for path in (tmp_path / "my loops").iterdir()) == ["other", "tickets"]
    assert f"export FINETUNE_LOOPS_DIR='{tmp_path}/my other loops'" in next_steps(
        run("x", "--folder", "my other loops")
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on busy cores it takes several times its 100 seconds
def test_from_a_file_of_rows_to_a_compared_model(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, JSON_ROWS)))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "DAGSTER_"))
    } | {"PYTHONPATH": str(PROJECT_ROOT), "HF_HUB_OFFLINE": "1", "FINETUNE_HOME": str(tmp_path / "home")}
    script = f"""
finetune() {{ {sys.executable} -m finetune_pipeline.cli.main "$@"; }}
finetune init tickets --data rows.jsonl --base {STARTER} || exit 3
export FINETUNE_LOOPS_DIR=$PWD/loops
finetune check --loop tickets || exit 4
finetune run --loop tickets
code=$?
finetune dataset card --loop tickets
exit $code
"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100
    )
    assert "loop tickets: no problems found" in done.stdout, done.stdout + done.stderr
    assert "verdict   promote" in done.stdout or "verdict   reject" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (0 if "promoted  tickets@v1.0.0" in done.stdout else 1)
    assert "# Dataset" in done.stdout and "benchmark question" not in done.stdout  # nothing was left to decontaminate
