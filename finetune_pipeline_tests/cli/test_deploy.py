"""`finetune deploy`, and what other commands say about targets."""

import json
import subprocess

import pytest
import yaml
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.deployment.targets import open_target
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.settings import COMPONENT_TYPE
from finetune_pipeline_tests.deployment.shelf import Shelf, shelf
from finetune_pipeline_tests.orchestration.conftest import ATTRIBUTES
from finetune_pipeline_tests.registry.conftest import STARTER, promote_gguf


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def promoted(content):
    path = deploy.stage_folder("notes", "gguf_model") / content / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return promote_gguf(path)


@pytest.fixture
def declare(tmp_path, monkeypatch):
    """Return a function that writes a loop of the user with these targets."""
    monkeypatch.setattr(deploy, "open_target", Shelf)
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "loops"))

    def declare(*names, **deploy):
        folder = tmp_path / "loops" / "notes"
        folder.mkdir(parents=True, exist_ok=True)
        question = {"id": "q", "slice": "s", "prompt": "p", "expected": "e"}
        (folder / "benchmark.jsonl").write_text(json.dumps(question) + "\n")
        attributes = {**ATTRIBUTES, "base_model": str(STARTER), "evaluation": {"benchmark": "benchmark.jsonl"}}
        attributes["evaluation"]["metric"] = "rouge1"
        attributes["deploy"] = {"targets": [shelf(name=name, path=str(tmp_path / name)) for name in names], **deploy}
        (folder / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": attributes}))
        monkeypatch.setenv("FINETUNE_LOOP", "notes")

    return declare


def words(line):
    return " ".join(line.split())


def test_status_and_apply_show_where_each_target_stands(declare, tmp_path):
    declare("first", "second")
    promoted("one")
    heading, *rows = map(words, run("deploy", "status").output.splitlines())
    assert heading == "target wanted observed state tries next try (UTC) last error"
    assert rows == ["first v1.0.0 pending 0", "second v1.0.0 pending 0"]
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "fail-stage").write_text("no space left on the server")
    result = run("deploy", "apply", code=1)
    assert "first: v1.0.0 is active\n" in result.stderr
    assert "second: failed (try 1, again in 30 s): no space left on the server\n" in result.stderr
    first, second = map(words, result.stdout.splitlines()[1:])
    assert first == "first v1.0.0 v1.0.0 active 0"
    assert second.startswith("second v1.0.0 failed 1 20") and second.endswith("no space left on the server")
    assert run("deploy", "status").stdout == result.stdout
    assert run("deploy", "apply", "first").exit_code == 0
    (tmp_path / "second" / "fail-stage").unlink()
    assert run("deploy", "apply", "second").exit_code == 0


def test_json_has_the_states(declare, tmp_path):
    declare("first")
    promoted("one")
    assert [one["state"] for one in json.loads(run("deploy", "status", "--json").output)] == ["pending"]
    [state] = json.loads(run("deploy", "apply", "--json").stdout)
    assert (state["target"], state["wanted"], state["observed"], state["state"]) == (
        "first", "v1.0.0", "v1.0.0", "active",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["status", "apply"])
def test_a_loop_without_targets_says_how_to_declare_some(declare, command):
    declare()
    assert "declares no deployment targets; add some under deploy.targets" in run("deploy", command).output


def test_an_unknown_target_is_an_error_that_names_the_known_ones(declare):
    declare("first")
    assert "has no target 'secnd'; there are: first" in str(run("deploy", "apply", "secnd", code=1).exception)


def test_notes_name_control_tokens_drift_and_the_start_command(declare, tmp_path, monkeypatch):
    declare("first")
    promoted("one")
    monkeypatch.setattr(deploy, "check_parity", lambda *_: {"reads_control_tokens": True})
    monkeypatch.setattr(Shelf, "start_command", lambda *_: "serve --max-model-len 4096")
    run("deploy", "apply")
    (tmp_path / "first" / "v7.gguf").write_text("by hand")
    (tmp_path / "first" / "current").write_text("v7")
    assert "first: serves v7 instead of v1.0.0" in run("deploy", "apply").stderr
    shown = run("deploy", "status").output
    assert "first: it reads control tokens of the chat template in messages" in shown
    assert "first: somebody changed what it serves: at " in shown and "it served v7" in shown
    assert "first: start the server with: serve --max-model-len 4096" in shown


def test_switch_and_rollback_deploy_and_never_fail_because_of_a_target(declare, tmp_path):
    declare("first")
    promoted("one")
    promoted("two")
    result = run("model", "switch", "v1.0.0")
    assert "notes@v1.0.0 is the champion now\n" in result.stdout and "first: v1.0.0 is active\n" in result.stdout
    (tmp_path / "first" / "fail-observe").write_text("connection refused")
    result = run("model", "rollback")
    assert champion(connect(), "notes").version == "v1.1.0"
    assert (
        "Warning: target first has failed, serves v1.0.0: connection refused; `finetune serve` or the next run tries "
        "it again; now: `finetune deploy apply`\n" in result.stderr
    )


def test_the_status_of_the_loop_has_one_line_about_targets(declare, tmp_path):
    declare("first", "second")
    promoted("one")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "refuse-stage").write_text("it takes no adapters")
    run("deploy", "apply", code=1)
    lines = [words(line) for line in run("status").output.splitlines() if line.startswith("  deployed")]
    assert lines == [
        "deployed 1 of 2 targets serve it; second is rejected: it takes no adapters; "
        "`finetune deploy status` shows more"
    ]
    (loop,) = json.loads(run("status", "--json").output)["loops"]
    assert [one["state"] for one in loop["targets"]] == ["active", "rejected"]


def test_a_tag_of_the_modelfiles_names_its_version(declare, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "open_target", open_target)
    declare(modelfiles={"path": str(tmp_path / "modelfiles")})
    models = [promoted(content) for content in ("one", "two", "three")]
    run("deploy", "apply")
    first, second, third = (f"finetuned-v{one.created_at:%Y-%m-%d}-{one.version}" for one in models)
    result = run("model", "switch", first)
    assert "notes@v1.0.0 is the champion now\nmodelfiles: " in result.stdout
    assert "modelfiles: v1.0.0 is active\n" in result.stdout
    assert "notes@v1.1.0" in run("model", "show", second).stdout
    assert "notes@v1.2.0 is the champion again\n" in run("model", "rollback", third).stdout  # the previous champion
    assert "notes@v1.0.0 is the champion again\n" in run("model", "rollback", "v1.0.0").stdout  # not the previous one
    assert "notes@v1.1.0 is the champion now\n" in run("model", "switch", second).stdout
    actions = [one["action"] for one in json.loads(run("model", "history", "--json").stdout)]
    assert actions == ["promote", "promote", "promote", "switch", "rollback", "switch", "switch"]
    assert "notes@v1.0.0 is the champion again\n" in run("model", "rollback").stdout
    wrong = "finetuned-v2001-01-01-v1.0.0"
    error = run("model", "switch", wrong, code=1).exception
    assert f"no version with the tag {wrong}; the tag of v1.0.0 is {first}" in str(error)
    tags = subprocess.run(["git", "tag"], cwd=tmp_path / "modelfiles", capture_output=True, text=True).stdout
    assert tags.split() == [first, second, third]
