"""`finetune run` and Dagster's home, without a run."""

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.cli.run import new_run
from finetune_pipeline.settings import COMPONENT_TYPE, PROJECT_ROOT, SettingsError, load_loop
from finetune_pipeline_tests.orchestration.conftest import corrected, make_loop, write_events  # noqa: F401


def test_dagsters_home_gets_the_projects_settings_without_paths(own_home):
    env = environment()
    assert env["DAGSTER_HOME"] == str(own_home.resolve() / "dagster")
    text = (own_home / "dagster" / "dagster.yaml").read_text()
    assert "data/state" not in text and "run_monitoring" in text


def test_a_dagster_home_that_is_set_is_not_changed(own_home, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "mine"))
    assert environment()["DAGSTER_HOME"] == str((tmp_path / "mine").resolve())
    assert not (tmp_path / "mine").exists()


def test_paths_for_dagster_are_absolute(own_home, tmp_path, monkeypatch):
    (tmp_path / "loops").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", "loops")
    monkeypatch.setenv("FINETUNE_DATABASE_URL", "sqlite:///own.db")
    env = environment()
    assert env["FINETUNE_LOOPS_DIR"] == str(tmp_path / "loops")
    assert env["FINETUNE_DATABASE_URL"] == f"sqlite:///{tmp_path / 'own.db'}"
    monkeypatch.setenv("FINETUNE_DATABASE_URL", env["FINETUNE_DATABASE_URL"])
    assert environment()["FINETUNE_DATABASE_URL"] == env["FINETUNE_DATABASE_URL"]


def test_a_home_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "file"))
    with pytest.raises(SettingsError, match=r"cannot be created or written .* set FINETUNE_HOME to a folder"):
        environment()
    result = CliRunner().invoke(finetune, ["doctor"])
    assert result.exit_code == 1 and "file cannot be created or written" in result.output


@pytest.mark.parametrize("problems", [["a.jsonl is missing"], ["a.jsonl is missing", "b.json is missing"]])
def test_a_log_is_only_named_once_the_checks_have_passed(monkeypatch, problems):
    monkeypatch.setattr("finetune_pipeline.pipeline.check_loop.check_loop", lambda *_, **__: problems)
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: pytest.fail("it ran"))
    for command in ("run", "check"):
        result = CliRunner().invoke(finetune, [command])
        assert result.exit_code == 1 and "complete log" not in result.output
        assert f"Loop aec_parser cannot run, {len(problems)} problem" in result.output
        assert all(f"\n  {problem}\n" in result.output for problem in problems)
    problems.clear()
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: 0)
    lines = CliRunner().invoke(finetune, ["run"]).output.splitlines()
    assert lines[0].startswith("checking the files, settings") and lines[2].startswith("complete log: ")
    note = "evaluation.benchmark: 266 questions find gains from about 5.9 points if 15% of the answers differ"
    assert lines[1] == note
    assert CliRunner().invoke(finetune, ["check"]).output == f"loop aec_parser: no problems found\n{note}\n"
    assert json.loads(CliRunner().invoke(finetune, ["check", "--json"]).output)["notes"] == [note]


def test_a_used_port_is_reported_before_dagster_starts(monkeypatch):
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("it started"))
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        result = CliRunner().invoke(finetune, ["ui", "--port", str(port)])
    assert isinstance(result.exception, SettingsError) and "open http" not in result.output
    assert f"127.0.0.1, port {port}, cannot be served (Address already in use)" in str(result.exception)
    assert str(result.exception).endswith("choose another with --port.")


@pytest.mark.parametrize("port", ["0", "-1", "65536", "70000", "x"])
def test_a_number_that_is_no_port_is_wrong_usage(port):
    result = CliRunner().invoke(finetune, ["ui", "--port", port])
    assert result.exit_code == 2 and "--port" in result.output


def test_two_runs_that_start_in_one_second_have_different_logs(monkeypatch):
    class AtOnce(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1)

    monkeypatch.setattr("finetune_pipeline.cli.run.datetime", AtOnce)
    loop = load_loop("aec_parser")
    assert new_run(loop)[1] != new_run(loop)[1]


@pytest.mark.usefixtures("kept_base_checks")
@pytest.mark.parametrize(("examples", "starts"), [(9, False), (10, True)])
def test_a_run_can_wait_for_enough_new_examples(make_loop, tmp_path, monkeypatch, examples, starts):  # noqa: F811
    loop = make_loop(base_model=str(PROJECT_ROOT / "data" / "starter_model"))
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
    write_events(loop.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(examples)))
    started = []
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: started.append(1) or 0)
    result = CliRunner().invoke(finetune, ["run", "--if-triggered"])
    assert (result.exit_code, bool(started)) == (0, starts), result.output
    numbers = f"{examples} new high-reward examples, 10 needed"
    assert (numbers if starts else f"no run is due: {numbers}") in result.output.splitlines()


@pytest.mark.parametrize("ends", [False, True])
def test_the_address_of_the_ui_is_printed_when_it_answers(ends):
    """And not at all if Dagster ends before."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve = "pass" if ends else f"server = socket.create_server(('127.0.0.1', {port})); server.accept(); time.sleep(2)"
    program = (
        "import socket, time; from finetune_pipeline.cli.run import _announce_ui; "
        f"_announce_ui({port}); time.sleep(1); print('not yet', flush=True); {serve}"
    )
    # The output ends when the announcing process has ended too.
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    ready = f"ready: open http://127.0.0.1:{port}; stop with Ctrl-C\n"
    assert (ended.returncode, ended.stdout) == (0, "not yet\n" + ("" if ends else ready)), ended.stderr


def test_a_second_ui_of_a_home_is_refused(own_home):
    """Otherwise two daemons would launch each run of the sensor."""
    folder = Path(environment()["DAGSTER_HOME"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
    lock = os.open(folder / "ui.lock", os.O_CREAT | os.O_RDWR)
    os.write(lock, b"http://127.0.0.1:3000")
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(SettingsError, match=r"is open already, at http://127\.0\.0\.1:3000; use that one, or end"):
            CliRunner().invoke(finetune, ["ui", "--port", str(free)], catch_exceptions=False)
    finally:
        os.close(lock)


def test_check_names_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file instead of the folder")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(finetune, ["check"])
    assert result.exit_code == 1 and "cannot be created or written" in result.output


def declared(tmp_path, monkeypatch, text):
    """Declare a loop with further lines of attributes, which are indented by two; return its YAML."""
    path = tmp_path / "loops" / "notes" / "defs.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"type: {COMPONENT_TYPE}\nattributes:\n  name: notes\n{text}")
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "loops"))
    return path


@pytest.mark.usefixtures("own_home", "kept_base_checks")
def test_check_warns_of_unset_variables_that_stop_no_run(tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"id": "q", "slice": "s", "prompt": "p", "expected": "e"}')
    base, benchmark = PROJECT_ROOT / "data" / "starter_model", tmp_path / "b.jsonl"
    lines = [
        f"  base_model: {base}",
        f"  evaluation: {{benchmark: {benchmark}, metric: rouge1}}",
        "  alerts: {slack_env: MY_SLACK, webhook_env: MY_HOOK}",
        "  deploy: {targets: [{kind: ollama, url: 'http://gpu:11434', api_key_env: MY_KEY}]}",
    ]
    declared(tmp_path, monkeypatch, "\n".join(lines) + "\n")
    monkeypatch.setenv("MY_HOOK", "https://example.com/hook")
    result = CliRunner().invoke(finetune, ["check"])
    assert result.exit_code == 0 and result.stdout.startswith("loop notes: no problems found\n")
    slack, key = result.stderr.splitlines()
    assert slack.startswith("Warning: alerts.slack_env: the environment variable MY_SLACK is not set here, so alerts ")
    assert slack.endswith("defs.yaml, line 6)") and "MY_KEY" in key and key.endswith("defs.yaml, line 7)")
    assert len(json.loads(CliRunner().invoke(finetune, ["check", "--json"]).stdout)["warnings"]) == 2


LENIENT = """\
  base_model: {base}
  evaluation: {{benchmark: /nowhere/b.jsonl, metric: rouge1}}
"""


@pytest.mark.usefixtures("own_home", "kept_base_checks")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("  training: {num_train_epochs: many}\n", "training.num_train_epochs: found 'many'"),
        ("  training: {lr: 1, num_train_epochs: x}\n  unknown: 1\n", "unknown: unknown setting"),
        ("  training: 7\n", "training: found 7"),
        ("  sources:\n  - {kind: files, name: a, path: /nowhere/a}\n  - {kind: files, name: b}\n", "sources[1].path"),
        ("  sources:\n  - {kind: odd, name: a}\n  - {kind: vault, name: b, path: 7}\n", "sources[0]"),
        ("  gate: {mode: points, min_gain: x}\n  curation: {min_reward: 9}\n", "curation.min_reward: found 9"),
    ],
)
@pytest.mark.parametrize("loop", [(), ("--loop", "notes")])
def test_invalid_settings_are_listed_with_the_other_problems(tmp_path, monkeypatch, lines, said, loop):
    declared(tmp_path, monkeypatch, LENIENT.format(base=PROJECT_ROOT / "data" / "starter_model") + lines)
    result = CliRunner().invoke(finetune, ["check", *loop])
    assert result.exit_code == 1
    assert "checked with the defaults of these" in result.output
    assert re.search(rf"  {re.escape(said)}.* \(line \d+\)\n", result.output)
    assert "/nowhere/b.jsonl does not exist" in result.output
    assert ("/nowhere/a does not exist" in result.output) == ("/nowhere/a" in lines)


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("lines", ["  evaluation: {benchmark: b}\n", "  base_model: 7\n  evaluation: {benchmark: b}\n"])
def test_without_a_setting_that_has_no_default_only_the_settings_are_checked(tmp_path, monkeypatch, lines):
    declared(tmp_path, monkeypatch, lines)
    with pytest.raises(SettingsError, match=r"invalid settings:\n  base_model: "):
        CliRunner().invoke(finetune, ["check"], catch_exceptions=False)


@pytest.mark.usefixtures("own_home")
def test_another_loops_invalid_settings_end_a_check(tmp_path, monkeypatch):
    declared(tmp_path, monkeypatch, LENIENT.format(base="a/b") + "  training: {num_train_epochs: many}\n")
    with pytest.raises(SettingsError, match="num_train_epochs"):
        CliRunner().invoke(finetune, ["check", "--loop", "aec_parser"], catch_exceptions=False)


@pytest.mark.usefixtures("own_home", "kept_base_checks")
@pytest.mark.parametrize(
    ("lines", "said", "line"),
    [
        ("", "/nowhere/b.jsonl does not exist", 5),
        ("  output_schema: /nowhere/s.json\n", "/nowhere/s.json does not exist", 6),
        ("  sources:\n  - {kind: files, name: a, path: /nowhere/a}\n", "sources[0] (a): /nowhere/a does not exist", 7),
        ("  ingest:\n    folders:\n      - /nowhere/logs\n", "folder /nowhere/logs does not exist", 8),
        ("  feedback:\n    reward_function: no.such\n", "'no.such' cannot be imported", 7),
        ("  curation: {replay: /nowhere/r}\n", "/nowhere/r does not exist", 6),
    ],
)
def test_a_problem_of_a_setting_has_its_line(tmp_path, monkeypatch, lines, said, line):
    path = declared(tmp_path, monkeypatch, LENIENT.format(base=PROJECT_ROOT / "data" / "starter_model") + lines)
    problems = json.loads(CliRunner().invoke(finetune, ["check", "--json"]).output)["problems"]
    [found] = [problem for problem in problems if said in problem]
    assert found.endswith(f"({path}, line {line})")
    assert any("/nowhere/b.jsonl" in problem for problem in problems)
