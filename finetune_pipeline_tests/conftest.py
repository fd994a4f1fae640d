"""Fixtures and builders for all tests. Each test has a FINETUNE_HOME of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
from finetune_pipeline.manifests import RawLogsManifest
from finetune_pipeline.ray_session import ADDRESS
from finetune_pipeline.records import Example, Feedback, Interaction
from finetune_pipeline.settings import PROJECT_ROOT

SHARED = PROJECT_ROOT.parent / "shared" / "data"
NAMESPACE = UUID("00000000-0000-4000-8000-000000000000")
START = datetime(2026, 1, 1, tzinfo=UTC)


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
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    database = connect(url)
    yield database
    database.engine.dispose()
