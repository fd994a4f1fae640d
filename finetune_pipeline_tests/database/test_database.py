import os
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from finetune_pipeline.database import DatabaseError, connect, connection
from finetune_pipeline.database.tables import metadata
from finetune_pipeline.settings import database_url


def test_the_migrations_give_the_tables():
    with connect().engine.connect() as open_connection:
        assert compare_metadata(MigrationContext.configure(open_connection), metadata) == []


def test_a_database_of_another_version_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    with connect(url).write() as open_connection:
        open_connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    connection._open.clear()
    with pytest.raises(DatabaseError, match="written by another version"):
        connect(url)


def test_a_database_that_cannot_be_opened_says_what_to_look_at(tmp_path):
    (tmp_path / "file").write_text("no database at all, but long enough to be read as one by mistake" * 10)
    with pytest.raises(DatabaseError, match="check FINETUNE_DATABASE_URL"):
        connect(f"sqlite:///{tmp_path / 'file'}")


@pytest.mark.parametrize("url", ["foo", "nothing://at/all", "sqlite:////proc/nope/x/file.db"])
def test_an_address_that_is_none_says_what_is_expected(url):
    with pytest.raises(DatabaseError, match=r"postgresql\+psycopg://|set FINETUNE_HOME"):
        connect(url)


def test_an_up_to_date_database_needs_no_alembic():
    connect()
    script = "import sys; from finetune_pipeline.database import connect; connect(); print('alembic' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_processes_that_start_together_make_the_tables_once():
    script = "from finetune_pipeline.database import connect; connect()"
    processes = [subprocess.Popen([sys.executable, "-c", script], env={**os.environ}) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]


def test_by_default_it_lies_under_the_home(own_home):
    assert database_url() == f"sqlite:///{own_home.resolve()}/finetune.db"
