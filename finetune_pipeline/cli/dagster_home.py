"""Dagster's own state, under `$FINETUNE_HOME/dagster` unless DAGSTER_HOME says otherwise."""

import os
from pathlib import Path

import yaml

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError, home

PATHS = ("local_artifact_storage", "compute_logs")


def environment() -> dict[str, str]:
    """The environment in which Dagster's commands run, with its home made ready.

    The project's `dagster.yaml` is copied there without its paths, which are for a bare `dagster` command. The storage
    is in DAGSTER_HOME itself.

    Raises:
        SettingsError: it cannot be made.
    """
    dagster_home = Path(os.environ.get("DAGSTER_HOME") or home() / "dagster").resolve()
    env = {**os.environ, "FINETUNE_HOME": str(home()), "DAGSTER_HOME": str(dagster_home)}
    if dagster_home == home() / "dagster":
        try:
            _prepare(dagster_home)
        except OSError as error:
            raise SettingsError(
                f"the folder {dagster_home} cannot be created or written ({error.strerror}); set FINETUNE_HOME to a "
                "folder that can be written"
            ) from error
    return env


def dagster_yaml() -> str:
    """Return the text of the `dagster.yaml` of a home."""
    settings = yaml.safe_load((PROJECT_ROOT / "dagster.yaml").read_text(encoding="utf-8"))
    settings["storage"]["custom"]["config"]["base_dir"] = {"env": "DAGSTER_HOME"}
    return yaml.safe_dump({key: value for key, value in settings.items() if key not in PATHS}, sort_keys=False)


def _prepare(dagster_home: Path) -> None:
    text = dagster_yaml()
    path = dagster_home / "dagster.yaml"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    dagster_home.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
