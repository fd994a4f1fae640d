import pytest

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.cli.run import summarise

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
        ("finetune_pipeline.artifacts.Busy: wait", f"\x1b[31m{'':<16} wait\x1b[0m"),  # the reason of a failure
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
