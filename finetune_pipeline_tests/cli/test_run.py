import pytest
from click.testing import CliRunner

from finetune_pipeline.cli import run
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.cli.run import materialize, summarise
from finetune_pipeline.settings import SettingsError, load_loop

HEAD = "2026-01-01 12:00:00 +0000 - dagster"
RUN = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"{HEAD} - INFO - __ASSET_JOB - {RUN} - raw_logs - 3 files", "raw_logs         3 files"),
        (f"{HEAD} - DEBUG - __ASSET_JOB - {RUN} - 77 - raw_logs - STEP_START - Started", "raw_logs         started"),
        (f"{HEAD} - DEBUG - __ASSET_JOB - {RUN} - 77 - ENGINE_EVENT - Executing steps", None),
        (f"{HEAD} - DEBUG - __ASSET_JOB - {RUN} - 77 - raw_logs - LOADED_INPUT - Loaded", None),
        ("Traceback (most recent call last):", None),
        ("ValueError: of somebody else", None),
        (
            "finetune_pipeline.artifacts.ArtifactBusyError: wait",
            f"\x1b[31m{'':<16} wait\x1b[0m",
        ),  # the reason of a failure
    ],
)
def test_of_dagsters_log_only_what_people_want_is_shown(line, shown):
    assert summarise(line) == shown


def test_dagsters_home_is_made_ready_without_the_paths_of_the_bare_command(own_home):
    env = environment()
    assert env["DAGSTER_HOME"] == str(own_home.resolve() / "dagster")
    text = (own_home / "dagster" / "dagster.yaml").read_text()
    assert "data/state" not in text and "run_monitoring" in text


def test_a_home_of_ones_own_is_left_alone(own_home, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "mine"))
    assert environment()["DAGSTER_HOME"] == str((tmp_path / "mine").resolve())
    assert not (tmp_path / "mine").exists()


def test_why_definitions_do_not_load_is_shown_and_not_only_logged(own_home, monkeypatch, capsys):
    monkeypatch.setattr(run, "DEFINITIONS", "finetune_pipeline.no_such_module")
    assert materialize(load_loop("aec_parser")) != 0
    said = capsys.readouterr().out
    assert "no_such_module" in said and "Dagster's whole log is in" in said


def test_a_home_that_cannot_be_made_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "file"))
    with pytest.raises(SettingsError, match=r"cannot be made or written .* set FINETUNE_HOME to a folder"):
        environment()
    result = CliRunner().invoke(finetune, ["doctor"])
    assert result.exit_code == 1 and "file cannot be made or written" in result.output
