"""Dagster's home: `$FINETUNE_HOME/dagster`, unless DAGSTER_HOME is set."""

import fcntl
import os
from pathlib import Path

import yaml

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError, home, loops_dir

PATHS = ("storage", "local_artifact_storage", "compute_logs")


def environment() -> dict[str, str]:
    """Create Dagster's home and return the environment variables for Dagster's commands, with absolute paths.

    The home gets the project's `dagster.yaml` without the paths in it, which are for bare `dagster` commands.

    Raises:
        SettingsError: the home cannot be created or written.
    """
    dagster_home = Path(os.environ.get("DAGSTER_HOME") or home() / "dagster").resolve()
    env = {**os.environ, "FINETUNE_HOME": str(home()), "DAGSTER_HOME": str(dagster_home)}
    if outside := loops_dir():
        env["FINETUNE_LOOPS_DIR"] = str(outside)
    driver, _, file = env.get("FINETUNE_DATABASE_URL", "").partition(":///")
    if driver.startswith("sqlite") and file and file != ":memory:":
        env["FINETUNE_DATABASE_URL"] = f"{driver}:///{Path(file).absolute()}"
    if dagster_home == home() / "dagster":
        try:
            text, path = dagster_yaml(), dagster_home / "dagster.yaml"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
        except OSError as error:
            raise SettingsError(
                f"the folder {dagster_home} cannot be created or written ({error.strerror}); set FINETUNE_HOME to a "
                "folder that can be written"
            ) from error
        from finetune_pipeline.orchestration.storage import create_storage  # loads Dagster

        create_storage(dagster_home)
    return env


def dagster_yaml() -> str:
    """Return the content of the `dagster.yaml` in a home: the project's without paths, which default to the home."""
    settings = yaml.safe_load((PROJECT_ROOT / "dagster.yaml").read_text(encoding="utf-8"))
    return yaml.safe_dump({key: value for key, value in settings.items() if key not in PATHS}, sort_keys=False)


def hold_ui_lock(dagster_home: Path, address: str) -> None:
    """Lock Dagster's home for the UI until this process ends, also as the program that it becomes.

    A second UI of a home would start a second daemon, and each would launch the sensor's runs.

    Raises:
        SettingsError: another UI holds the lock.
    """
    if not dagster_home.is_dir():
        return  # a home of the user's own that Dagster will report
    lock = os.open(dagster_home / "ui.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.read(lock, 100).decode() or "another address"
        os.close(lock)
        raise SettingsError(
            f"Dagster's UI of {dagster_home} is open already, at {other}; use that one, or end it first"
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, address.encode())
    os.set_inheritable(lock, True)
