"""A real database for each test: SQLite always, PostgreSQL where a server is installed."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import Database, connect
from finetune_pipeline.registry.models import Candidate

MakeCandidate = Callable[..., Candidate]


def _postgres_programs() -> Path | None:
    on_path = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = Path(on_path) if on_path else installed[-1] if installed else None
    return found.parent if found else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, in a temporary folder."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (initdb was not found)")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'finetune-pipeline[postgres]'")
    # PostgreSQL refuses to run as root, and the folder has to belong to who runs it.
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
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
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


@pytest.fixture
def candidate(own_home: Path) -> MakeCandidate:
    """Makes a GGUF of some content and the candidate that names it."""

    def make(
        content: str, *, base: str = "base-1", mode: Literal["full", "incremental"] = "incremental", loop: str = "aec"
    ) -> Candidate:
        path = own_home / "artifacts" / loop / content / "model.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return Candidate(
            loop=loop,
            gguf_path=path,
            gguf_sha256=hash_file(path),
            base_hash=base,
            mode=mode,
            lineage={"watermark": 50},
            scores={"accuracy": 0.8},
            report_path=path.parent / "report.html",
        )

    return make
