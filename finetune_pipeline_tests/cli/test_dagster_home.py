import sqlite3
from contextlib import closing

import dagster as dg
import pytest

from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.orchestration.storage import DATABASES, OLD_REVISION
from finetune_pipeline_tests.conftest import start_together

OPEN = """
import os
import dagster as dg
from finetune_pipeline.cli.dagster_home import environment
os.environ.update(environment())
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


@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_start_together_create_one_dagster_home(own_home, tmp_path, attempt):
    assert start_together(OPEN, tmp_path, [{}] * 3) == []
    home = own_home / "dagster"
    head = revisions(home)[DATABASES[0]]
    assert len(head) == 1 and head != [OLD_REVISION]
    assert revisions(home) == dict.fromkeys(DATABASES, head)


@pytest.mark.parametrize("name", DATABASES)
def test_a_dagster_home_with_two_revisions_is_repaired(own_home, monkeypatch, name):
    home = own_home / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", environment()["DAGSTER_HOME"])
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("kept", ["a"])
    before = revisions(home)
    with closing(sqlite3.connect(home / name)) as connection, connection:
        connection.execute("INSERT INTO alembic_version VALUES (?)", (OLD_REVISION,))
    (home / "history" / ".created").unlink()  # such a home is from before there was one
    environment()
    with dg.DagsterInstance.get() as instance:
        assert instance.get_dynamic_partitions("kept") == ["a"]
        instance.all_instigator_state()
    assert revisions(home) == before
