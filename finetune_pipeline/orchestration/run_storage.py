"""Dagster's SQLite storage, created by one process at a time; `dagster.yaml` selects it for every command."""

import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from dagster._core.storage.sqlite import LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION as OLD_REVISION
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from filelock import FileLock

DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_log = logging.getLogger(__name__)


class LockedSqliteStorage(DagsterSqliteStorage):
    """`DagsterSqliteStorage` that creates its databases under a lock.

    Dagster assumes that a database with tables but without an Alembic revision is from an old version, and stamps that
    version. So a process that opens a database while another one creates it adds a second revision, and no command can
    open it any more ("more than one head present").
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        folder = Path(base_dir)
        created = folder / "history" / ".created"
        if created.exists():  # every step opens the storage; steps must not wait for each other
            super().__init__(base_dir, inst_data)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".creation.lock"):
            for name in DATABASES:
                _drop_second_revision(folder / name)
            super().__init__(base_dir, inst_data)
            created.touch()

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "LockedSqliteStorage":
        """Open the storage that a `dagster.yaml` describes; the inherited method would return the parent class."""
        return cls.from_local(inst_data=inst_data, **config_value)


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
