"""Database connections and transactions, and the migration to this version's tables."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.engine import make_url

from finetune_pipeline.settings import database_url, survives_power_cut

HEAD = "0025"
"""The newest migration. Stated here, so that an up-to-date database is opened without importing Alembic."""

_BUSY_MS = 30_000
_MIGRATION_LOCK = 0x66696E6574756E65
"""The key of a PostgreSQL advisory lock: a number that no other program uses ("finetune" in ASCII)."""

_DISK_FULL = ("database or disk is full", "disk I/O error", "No space left on device")


class DatabaseError(RuntimeError):
    """The database cannot be used; the message says why and what to do."""


class Database:
    """A database. `read()` and `write()` yield a connection within a transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection whose statements all see the same state; for reading only."""
        # SQLite's transactions do so anyway; by PostgreSQL's default each statement sees a new state.
        options = {} if self.engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Yield a connection whose transaction is committed at the end, or rolled back by an error.

        Raises:
            DatabaseError: the disk is full, the database is read-only, or another program has locked it.
        """
        try:
            with self.engine.connect().execution_options(finetune_write=True) as connection, connection.begin():
                yield connection
        except sa.exc.OperationalError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            if "database is locked" in str(error.orig):
                raise DatabaseError(
                    f"another program has been writing to the database {where} for {_BUSY_MS / 1000:g} s; nothing of "
                    "this step was stored. Wait until that program ends, or end it, then run this again"
                ) from error
            if "readonly database" in str(error.orig):
                raise DatabaseError(
                    f"the database {where} is read-only; nothing of this step was stored. Give this user write access "
                    "to the file and its folder, or set FINETUNE_HOME to a writable folder"
                ) from error
            if not any(words in str(error.orig) for words in _DISK_FULL):
                raise
            raise DatabaseError(
                f"the disk of the database {where} is full ({error.orig}); nothing of this step was stored, and "
                "nothing before it is lost. Free some space, then run this again"
            ) from error


_open: dict[str, Database] = {}
_opening = threading.Lock()


def connect(url: str | None = None) -> Database:
    """Return the database at `url` (default: the configured one), after migrating it if necessary.

    Raises:
        DatabaseError: it cannot be reached, or was written by a newer version of the project.
    """
    url = url or database_url()
    with _opening:
        if url not in _open:
            _open[url] = _connect(url)
        return _open[url]


def _connect(url: str) -> Database:
    try:
        sqlite = make_url(url).get_backend_name() == "sqlite"
        if sqlite and _is_read_only(url):
            return _read_only(url)
        engine = _sqlite(url) if sqlite else sa.create_engine(url, pool_pre_ping=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise DatabaseError(
            f"FINETUNE_DATABASE_URL cannot be used ({error}); expected sqlite:///PATH or "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        ) from error
    except OSError as error:
        raise DatabaseError(
            f"the folder of the database cannot be created ({error}); set FINETUNE_HOME to a writable folder"
        ) from error
    try:
        # One process at a time opens a new SQLite file: two that switch it to WAL mode at once fail with "database is
        # locked" without waiting.
        is_file = sqlite and engine.url.database not in {None, "", ":memory:"}
        with FileLock(f"{engine.url.database}.migration.lock") if is_file else nullcontext():
            if not _is_up_to_date(engine, url):
                _migrate(engine, url)
    except (sa.exc.DBAPIError, OSError) as error:
        where = make_url(url).render_as_string(hide_password=True)
        raise DatabaseError(
            f"the database {where} cannot be opened ({getattr(error, 'orig', error)}); check FINETUNE_DATABASE_URL, "
            "that the folder is writable, and that the disk is not full"
        ) from error
    return Database(engine)


def _is_read_only(url: str) -> bool:
    path = Path(make_url(url).database or "")
    return path.is_file() and not all(os.access(one, os.W_OK) for one in (path, path.parent))


def _read_only(url: str) -> Database:
    """Open an SQLite database that cannot be written, such as on a read-only mount.

    Raises:
        DatabaseError: it has to be migrated first, or cannot be read.
    """
    path = Path(str(make_url(url).database)).resolve()
    log = Path(f"{path}-wal")
    # Without its write-ahead log nobody is writing the file, and SQLite reads it without files beside it.
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    address = f"file:{quote(str(path))}?{mode}"
    engine = sa.create_engine(url, creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False))
    try:
        is_current = _is_up_to_date(engine, url)
    except sa.exc.DBAPIError as error:
        raise DatabaseError(
            f"the database {path} cannot be read ({error.orig}), and its file or folder cannot be written; give this "
            "user write access to both, or copy the folder to a writable one and set FINETUNE_HOME to it"
        ) from error
    if not is_current:
        raise DatabaseError(
            f"the database {path} is of another version and has to be migrated, but its file or folder cannot be "
            "written; give this user write access to both, or copy the folder to a writable one and set FINETUNE_HOME "
            "to it"
        )
    return Database(engine)


def _sqlite(url: str) -> sa.Engine:
    path = make_url(url).database
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # prompts are private: nobody but this user may read a new file
            Path(path).touch(mode=0o600, exist_ok=False)
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_MS / 1000})

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # `_begin` starts transactions, not the driver
        connection.execute("PRAGMA journal_mode=WAL")
        # NORMAL survives a kill of the process; FULL flushes each commit, and also survives a power cut.
        connection.execute(f"PRAGMA synchronous={'FULL' if survives_power_cut() else 'NORMAL'}")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later fails if another wrote in between, so writers lock at once.
        writes = connection.get_execution_options().get("finetune_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _is_up_to_date(engine: sa.Engine, url: str) -> bool:
    """Return whether the database has this version's tables.

    Raises:
        DatabaseError: it has two revisions.
    """
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return False
        revisions = sorted(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars())
    if len(revisions) > 1:
        raise DatabaseError(
            f"the database {make_url(url).render_as_string(hide_password=True)} has the revisions "
            f"{' and '.join(revisions)}, expected one: two programs created or migrated it at the same time. If it "
            "is still empty, delete it and run again; otherwise restore a backup from before that"
        )
    return revisions == [HEAD]


def _migrate(engine: sa.Engine, url: str) -> None:
    # Imported here, because Alembic takes 0.2 s and an up-to-date database does not need it.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect().execution_options(finetune_write=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":  # until commit; no table exists yet that could be locked
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            where = make_url(url).render_as_string(hide_password=True)
            raise DatabaseError(
                f"the database {where} was written by another version of this project ({error}); "
                "update the project, or set FINETUNE_DATABASE_URL to another database"
            ) from error
