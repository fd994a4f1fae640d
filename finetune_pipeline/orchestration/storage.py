"""Dagster's storage: creates the SQLite databases of a home, one process at a time, and words their errors."""

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from filelock import FileLock

from finetune_pipeline.artifacts import ArtifactError, disk_full

DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
OLD_REVISION = "5771160a95ad"
"""Revision that Dagster stamps on a database that has tables and no revision, since it takes it for an old one."""
_FREE_BYTES = 2_000_000  # with less space, SQLite cannot be expected to write
_log = logging.getLogger(__name__)


def create_storage(dagster_home: Path) -> None:
    """Create Dagster's databases in one process at a time.

    A process that opens a database while another one creates it stamps a second revision on it, and no command can open
    it any more ("more than one head present").
    """
    created = dagster_home / "history" / ".created"
    if created.exists():
        return
    with FileLock(dagster_home / ".creation.lock"):
        for path in (dagster_home / name for name in DATABASES):
            _drop_second_revision(path)
        with dg.DagsterInstance.from_config(str(dagster_home)):
            created.touch()


def _drop_second_revision(path: Path) -> None:
    """Repair a database that two processes created at once; its tables are those of the newer revision."""
    if not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return
        if connection.execute("SELECT count(*) FROM alembic_version").fetchone()[0] > 1:
            connection.execute("DELETE FROM alembic_version WHERE version_num = ?", (OLD_REVISION,))
            _log.warning("%s was created by two processes at once; its second revision was removed", path)


@contextmanager
def storage_errors(dagster_home: str | Path) -> Iterator[None]:
    """Replace errors of Dagster's databases, which say nothing of a full disk, by one that says what to do.

    Raises:
        ArtifactError: a database could not be read or written.
    """
    try:
        yield
    except sa.exc.DBAPIError as error:
        folder = Path(dagster_home)
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            raise disk_full(folder, error.orig) from error
        raise ArtifactError(
            f"Dagster's storage in {folder} cannot be read or written ({error.orig}); check that the folder is "
            "writable and the disk is not full, then run again"
        ) from error
