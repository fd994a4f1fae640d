"""`finetune run` and Dagster's home, without a run."""

import socket
from datetime import datetime

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.cli.run import new_run
from finetune_pipeline.settings import SettingsError, load_loop


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
    assert lines[0].startswith("checking the files, settings") and lines[1].startswith("complete log: ")
    assert CliRunner().invoke(finetune, ["check"]).output == "loop aec_parser: no problems found\n"


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
