"""Fixtures and builders for all tests. Each test has a FINETUNE_HOME of its own."""

import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import numpy as np
import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION, read_split
from finetune_pipeline.curation.snapshot import COLUMNS, Shard, Snapshot, example_of
from finetune_pipeline.database import Database, connect, connection
from finetune_pipeline.export import process as export_process
from finetune_pipeline.manifests import RawLogsManifest
from finetune_pipeline.ray_session import ADDRESS
from finetune_pipeline.records import Example, Feedback, Interaction
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline.training import child_process
from finetune_pipeline_tests import warm_processes

# Read when torch is loaded: several test processes run side by side, and their threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the training process

SHARED = PROJECT_ROOT.parent / "shared" / "data"
NAMESPACE = UUID("00000000-0000-4000-8000-000000000000")
START = datetime(2026, 1, 1, tzinfo=UTC)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that no worker starts one when the others are nearly done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def dataset_rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of prompt_completion/ of a dataset."""
    return list(read_split(dataset, PROMPT_COMPLETION, split))


def snapshot_examples(raw_logs: Artifact[RawLogsManifest]) -> list[Example]:
    """Return the examples of a snapshot; an interaction's row in a later shard replaces earlier ones."""
    rows = Snapshot([Shard(raw_logs.path / shard) for shard in raw_logs.manifest.shards])
    current = rows.take(np.flatnonzero(~rows.superseded()), COLUMNS).to_pylist()
    return [example_of(row) for row in current if row["target"] is not None]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set FINETUNE_HOME to a temporary folder for each test."""
    home = tmp_path / "home"
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.delenv("FINETUNE_DATABASE_URL", raising=False)
    before = {*connection._open}
    yield home
    # Otherwise a process that runs thousands of tests would keep thousands of database files open.
    for url in {*connection._open} - before:
        connection._open.pop(url).engine.dispose()


@pytest.fixture(scope="session")
def _base_checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base_checks")


@pytest.fixture
def kept_base_checks(own_home: Path, _base_checks: Path) -> None:
    """Let the tests of a module share the cached checks of base models, which take 6 seconds each."""
    (own_home / "cache").mkdir(parents=True)
    (own_home / "cache" / "base_checks").symlink_to(_base_checks)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SQLite database with this version's tables."""
    path = tmp_path_factory.mktemp("migrated") / "tests.db"
    engine = connection._sqlite(f"sqlite:///{path}")
    connection._migrate(engine, f"sqlite:///{path}")
    engine.dispose()
    return path


@pytest.fixture(autouse=True)
def new_databases_are_copies(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, migrated_file: Path
) -> None:
    """Fill a new SQLite database of this process from a migrated one: that is 30 times faster than migrating it.

    The tests of the database migrate.
    """
    if "database" in request.path.parent.name:
        return
    migrate = connection._migrate

    def copy(engine: sa.Engine, url: str) -> None:
        if engine.dialect.name != "sqlite" or sa.inspect(engine).get_table_names():
            migrate(engine, url)
            return
        raw = engine.raw_connection()
        with closing(sqlite3.connect(migrated_file)) as source:
            source.backup(raw.driver_connection)  # type: ignore[arg-type]
        raw.close()

    monkeypatch.setattr(connection, "_migrate", copy)


@pytest.fixture(scope="session", autouse=True)
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fork the processes of training and export from one that has imported their libraries already."""
    with warm_processes.forked_training_and_export(tmp_path_factory.mktemp("output")):
        yield


@pytest.fixture(autouse=True)
def really_started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the processes of training and export as the product does, in a test marked `real_processes`."""
    if request.node.get_closest_marker("real_processes"):
        monkeypatch.setattr(child_process, "_start", warm_processes.START_TRAINING)
        monkeypatch.setattr(export_process, "_start", warm_processes.START_EXPORT)


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='pip install "finetune-pipeline[ray]"')
RAY_TOKEN = secrets.token_hex(32)  # the same for all clusters, because a process keeps the token of its first one


@pytest.fixture
def two_ray_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start two Ray nodes with one core each, which Ray treats as two machines, and set RAY_ADDRESS."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        monkeypatch.setenv(ADDRESS, cluster.address)
        yield
    finally:
        cluster.shutdown()


def start_together(script: str, folder: Path, environments: Sequence[dict[str, str]]) -> list[str]:
    """Run a script in one process per environment, all at the same moment; return the stderr of failed ones."""
    go = folder / "go"
    waiting = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.0005)\n"
    # Imports are slow, so they come before the wait.
    heads = [line for line in script.splitlines() if line.startswith(("import ", "from "))]
    source = "\n".join([*heads, "print('ready', flush=True)", waiting, script])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source], env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for own in environments
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
    go.touch()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    go.unlink()
    return [text for text, process in zip(errors, processes, strict=True) if process.returncode]


def uid(name: str) -> UUID:
    """Return an id for a name, the same in every run."""
    return uuid5(NAMESPACE, name)


def interaction(name: str, **fields: Any) -> Interaction:
    """Return an interaction; fields that are not given get defaults."""
    given = {"prompt": f"prompt {name}", "output": f"answer {name}", "confidence": 0.9, "created_at": START}
    return Interaction(id=uid(name), loop="notes", **{**given, **fields})


def feedback(name: str, on: str, kind: str, minutes: int = 0, **fields: Any) -> Feedback:
    """Return feedback on the interaction `on`, some minutes after START."""
    at = START + timedelta(minutes=minutes)
    return Feedback(id=uid(name), loop="notes", interaction_id=uid(on), created_at=at, kind=kind, **fields)


def _postgres_programs() -> Path | None:
    on_path = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = Path(on_path) if on_path else installed[-1] if installed else None
    return found.parent if found else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server in a temporary folder and return its URL."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (initdb was not found)")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'finetune-pipeline[postgres]'")
    # PostgreSQL refuses to run as root, and its folder must belong to the user that runs it.
    user = "nobody" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="finetune-postgres-"))
    if user:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    control = str(programs / "pg_ctl")
    run(str(programs / "initdb"), "-D", f"{folder}/data", "-U", "tests", "-A", "trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        run(control, "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        yield f"postgresql+psycopg://tests@127.0.0.1:{port}"
        run(control, "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tests.db'}"
    server = request.getfixturevalue("postgres")
    name = f"t{abs(hash(request.node.nodeid)):x}"
    template = (
        ""
        if request.path.parent.name in {"database", "sources"}
        else f" TEMPLATE {request.getfixturevalue('migrated_name')}"
    )
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}{template}"))
    engine.dispose()
    return f"{server}/{name}"


@pytest.fixture(scope="session")
def migrated_name(postgres: str) -> str:
    """Return the name of a PostgreSQL database with this version's tables."""
    engine = sa.create_engine(f"{postgres}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connected:
        connected.execute(sa.text("CREATE DATABASE migrated"))
    engine.dispose()
    connect(f"{postgres}/migrated").engine.dispose()
    return "migrated"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    database = connect(url)
    yield database
    database.engine.dispose()
