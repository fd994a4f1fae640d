import sqlite3
from contextlib import closing

import dagster as dg
import pytest

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.orchestration.run_storage import DATABASES, OLD_REVISION
from finetune_pipeline_tests.conftest import start_together

OPEN = """
import dagster as dg
with dg.DagsterInstance.get() as instance:
    instance.get_runs(limit=1)
    instance.all_asset_keys()
    instance.all_instigator_state()
"""


def revisions(home):
    """Database -> its Alembic revisions."""
    found = {}
    for name in DATABASES:
        with closing(sqlite3.connect(home / name)) as connection:
            found[name] = [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
    return found


@pytest.fixture
def home(own_home):
    environment()
    return own_home / "dagster"


@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_start_together_create_one_dagster_home(home, tmp_path, monkeypatch, attempt):
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    assert start_together(OPEN, tmp_path, [{}] * 3) == []
    head = revisions(home)[DATABASES[0]]
    assert len(head) == 1 and head != [OLD_REVISION]
    assert revisions(home) == dict.fromkeys(DATABASES, head)


@pytest.mark.parametrize("name", DATABASES)
def test_a_dagster_home_with_two_revisions_is_repaired(home, monkeypatch, name):
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("kept", ["a"])
    before = revisions(home)
    with closing(sqlite3.connect(home / name)) as connection, connection:
        connection.execute("INSERT INTO alembic_version VALUES (?)", (OLD_REVISION,))
    (home / "history" / ".created").unlink()  # such a home is from before there was one
    with dg.DagsterInstance.get() as instance:
        assert instance.get_dynamic_partitions("kept") == ["a"]
        instance.all_instigator_state()
    assert revisions(home) == before
