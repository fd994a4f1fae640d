import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from finetune_pipeline.database import DatabaseError, connect, connection
from finetune_pipeline.database.tables import metadata
from finetune_pipeline.deployment.target_state import take_lease, target_states
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import counters, find_interaction, recompute_marked, unmatched_feedback
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.training_jobs import find_job
from finetune_pipeline.settings import database_url
from finetune_pipeline_tests.conftest import start_together, uid


def test_the_migrations_create_the_declared_tables():
    with connect().engine.connect() as open_connection:
        assert compare_metadata(MigrationContext.configure(open_connection), metadata) == []


def test_a_database_of_another_version_is_rejected(tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    with connect(url).write() as open_connection:
        open_connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    connection._open.clear()
    with pytest.raises(DatabaseError, match="written by another version"):
        connect(url)


def test_a_database_that_cannot_be_opened_is_reported_with_advice(tmp_path):
    (tmp_path / "file").write_text("no database at all, but long enough to be read as one by mistake" * 10)
    with pytest.raises(DatabaseError, match="check FINETUNE_DATABASE_URL"):
        connect(f"sqlite:///{tmp_path / 'file'}")


@pytest.mark.parametrize("url", ["foo", "nothing://at/all", "sqlite:////proc/nope/x/file.db"])
def test_an_invalid_address_is_reported_with_the_expected_form(url):
    with pytest.raises(DatabaseError, match=r"postgresql\+psycopg://|set FINETUNE_HOME"):
        connect(url)


def test_an_up_to_date_database_needs_no_alembic():
    connect()
    script = "import sys; from finetune_pipeline.database import connect; connect(); print('alembic' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


OPEN = """
import sqlalchemy as sa
from finetune_pipeline.database import connect
with connect().write() as connection:
    connection.execute(sa.text("UPDATE counters SET value = value + 1 WHERE name = 'events'"))
"""


@pytest.mark.parametrize("start", ["empty", "empty", "0001"])
def test_processes_that_start_together_create_or_migrate_once(url, tmp_path, start):
    if start != "empty":
        migrate_to(url, start)
    # Each in its own home, as on several machines: what they share is the database.
    own = [{"FINETUNE_DATABASE_URL": url, "FINETUNE_HOME": str(tmp_path / f"home{n}")} for n in range(4)]
    assert start_together(OPEN, tmp_path, own) == []
    database = connect(url)
    with database.read() as open_connection:
        revisions = open_connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all()
        assert revisions == [connection.HEAD]
        events = sa.text("SELECT value FROM counters WHERE name = 'events'")
        assert open_connection.execute(events).scalar_one() == 4
    database.engine.dispose()


def test_a_database_with_two_revisions_says_what_to_do(url):
    with connect(url).write() as open_connection:
        open_connection.execute(sa.text("INSERT INTO alembic_version VALUES ('0001')"))
    connection._open.pop(url).engine.dispose()
    with pytest.raises(DatabaseError, match=r"expected one: two programs created or migrated it .* delete it and run"):
        connect(url)


def test_the_default_database_is_in_the_home_folder(own_home):
    assert database_url() == f"sqlite:///{own_home.resolve()}/finetune.db"


def migrate_to(url, revision, rows=()):
    """Make a database of an earlier version."""
    engine = sa.create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(Path(connection.__file__).parent / "migrations"))
    with engine.begin() as open_connection:
        config.attributes["connection"] = open_connection
        command.upgrade(config, revision)
        for row in rows:
            open_connection.execute(sa.text(row))
    engine.dispose()


OLD_ROWS = (
    "INSERT INTO interactions (id, task, sequence, created_at, prompt, output) "
    "VALUES ('i1', 'notes', 1, '2026-01-01', 'a wall', 'an answer'), ('i2', 'notes', 2, '2026-01-01', 'a door', 'x')",
    "INSERT INTO feedback (id, task, sequence, interaction_id, created_at, kind) VALUES "
    "('f1', 'notes', 3, 'i1', '2026-01-01', 'thumbs_up'), ('f2', 'notes', 4, 'gone', '2026-01-01', 'thumbs_down')",
    "INSERT INTO examples (interaction_id, task, sequence, content_hash, target, reward, confirmed, corrected) "
    "VALUES ('i1', 'notes', 3, 'hash', 'an answer', 1.0, true, false)",
    "INSERT INTO models (id, loop, major, minor, patch, gguf_path, gguf_sha256, base_hash, mode, lineage, scores, "
    "report_path, created_at) VALUES ('m1', 'notes', 1, 0, 0, 'x.gguf', 'hash', 'base', 'full', '{}', '{}', 'r', "
    "'2026-01-01')",
    "UPDATE counters SET value = 4 WHERE name = 'events'",
)


def test_a_database_of_an_earlier_version_keeps_its_rows_and_is_counted(url):
    migrate_to(url, "0001", OLD_ROWS)
    database = connect(url)
    with database.read() as open_connection:
        assert counters(open_connection, "notes") == {
            "interactions": 2, "feedback": 2, "feedback.thumbs_up": 1, "feedback.thumbs_down": 1, "examples": 1,
            "rewarded": 1, "unmatched": 1,
        }  # fmt: skip
        row = open_connection.execute(sa.text("SELECT history, flag FROM interactions WHERE id = 'i1'")).one()
        assert tuple(row) == (None, None)
        versions = open_connection.execute(sa.text("SELECT gguf_path, deployed_at FROM model_versions"))
        assert versions.one()[0] == "x.gguf"
    with database.engine.connect() as open_connection:
        assert compare_metadata(MigrationContext.configure(open_connection), metadata) == []
    database.engine.dispose()


# One row or more of every table that the vocabulary migration renames or whose columns it renames.
ROWS_BEFORE_THE_VOCABULARY = (
    "INSERT INTO interactions (id, task, sequence, created_at, prompt, output, arm, source, origin, withdrawn) VALUES "
    f"('{uid('a')}', 'notes', 1, '2026-01-01', 'a wall', 'an answer', 'champion', NULL, NULL, NULL), "
    f"('{uid('b')}', 'notes', 2, '2026-01-01', 'a door', 'x', NULL, 'vault', 'a.md', 7)",
    "INSERT INTO feedback (id, task, sequence, interaction_id, created_at, kind) "
    f"VALUES ('{uid('f')}', 'notes', 3, '{uid('a')}', '2026-01-01', 'thumbs_up')",
    "INSERT INTO examples (interaction_id, task, sequence, content_hash, target, reward, confirmed, corrected) "
    f"VALUES ('{uid('a')}', 'notes', 3, 'hash', 'an answer', 1.0, true, false)",
    "INSERT INTO tallies VALUES ('notes', 'examples', 1)",
    "INSERT INTO forgotten_events VALUES ('e', 'notes', 5)",
    "INSERT INTO review_decisions (id, task, sequence, interaction_id, decision, reviewer, created_at) "
    f"VALUES ('d', 'notes', 6, '{uid('a')}', 'approve', 'ann', '2026-01-01')",
    'INSERT INTO ingested_files (task, path, size, mtime_ns, "offset", lines, rejected, prefix_hash, finished) '
    "VALUES ('notes', 'x.jsonl', 10, 1, 10, 2, 1, 'hash', true)",
    "INSERT INTO rejected_lines VALUES ('notes', 'x.jsonl', 2, 'not JSON', 'x')",
    "INSERT INTO source_marks VALUES ('notes', 'vault', '{}', '2026-01-01')",
    "INSERT INTO skipped_items VALUES ('notes', 'vault', 'b.md', 'empty')",
    "INSERT INTO made_artifacts VALUES ('notes', 'gguf_model', 'v', 'sha', '2026-01-01')",
    "INSERT INTO models (id, loop, major, minor, patch, gguf_path, gguf_sha256, base_hash, mode, lineage, scores, "
    "report_path, created_at) VALUES ('m1', 'notes', 1, 0, 0, 'x.gguf', 'hash', 'base', 'full', '{}', '{}', 'r', "
    "'2026-01-01')",
    "INSERT INTO deployments (loop, action, model_id, actor, reason, created_at) "
    "VALUES ('notes', 'promote', 'm1', 'ann', 'better', '2026-01-01')",
    "INSERT INTO model_comparisons (id, loop, challenger_sha256, champion_sha256, benchmark_sha256, promote, reason, "
    "watermark, report_path, created_at, after_move) VALUES ('c', 'notes', 'a', 'b', 'd', true, 'better', 3, 'r', "
    "'2026-01-01', 0)",
    "UPDATE counters SET value = 7 WHERE name = 'events'",
)


def test_renamed_tables_and_columns_keep_their_rows(url):
    migrate_to(url, "0009", ROWS_BEFORE_THE_VOCABULARY)
    database = connect(url)
    with database.read() as open_connection:
        found = find_interaction(open_connection, uid("a"))
        assert (found.interaction.loop, found.interaction.variant, found.example.ingest_offset) == (
            "notes",
            "champion",
            3,
        )
        assert [one.loop for one in found.feedback] == ["notes"]
        assert find_interaction(open_connection, uid("b")).interaction.provenance == "a.md"
        assert counters(open_connection, "notes") == {"examples": 1}
        rows = {
            table: [tuple(row) for row in open_connection.execute(sa.text(f"SELECT {columns} FROM {table}"))]
            for table, columns in {
                "interactions": "ingest_offset, retracted_offset",
                "erased_events": "id, loop, ingest_offset",
                "review_decisions": "loop, ingest_offset",
                "ingested_files": "loop, lines",
                "rejected_lines": "loop, line",
                "source_cursors": "loop, source, cursor",
                "skipped_records": "loop, provenance",
                "published_artifacts": "loop, version",
                "model_versions": "loop, major, gguf_path",
                "deployment_history": "loop, model_id",
                "comparisons": "id, after_deployment",
            }.items()
        }
    cursors = rows.pop("source_cursors")
    assert [(loop, source, str(cursor)) for loop, source, cursor in cursors] == [("notes", "vault", "{}")]
    assert rows == {
        "interactions": [(1, None), (2, 7)],
        "erased_events": [("e", "notes", 5)],
        "review_decisions": [("notes", 6)],
        "ingested_files": [("notes", 2)],
        "rejected_lines": [("notes", 2)],
        "skipped_records": [("notes", "b.md")],
        "published_artifacts": [("notes", "v")],
        "model_versions": [("notes", 1, "x.gguf")],
        "deployment_history": [("notes", "m1")],
        "comparisons": [("c", 0)],
    }
    with database.engine.connect() as open_connection:
        assert compare_metadata(MigrationContext.configure(open_connection), metadata) == []
    database.engine.dispose()


def test_a_registry_from_before_the_targets_keeps_its_history(url):
    """The deployments of an older registry have no config, and its targets have no row."""
    migrate_to(
        url,
        "0015",
        [
            "INSERT INTO deployment_history (loop, action, model_id, actor, reason, created_at) "
            "VALUES ('notes', 'promote', 'm1', 'ann', 'better', '2026-01-01')"
        ],
    )
    database = connect(url)
    [deployment] = list_deployments(database, "notes")
    assert (deployment.model_id, deployment.reason, deployment.config) == ("m1", "better", None)
    assert target_states(database, "notes") == {}
    with take_lease(database, "notes", "ollama") as lease:
        assert lease.state.state == "pending"
    database.engine.dispose()


AHEAD = "2999-01-01 00:00:00.000000"


def test_times_in_the_future_are_repaired_and_examples_recomputed(url):
    """What is given later outranks earlier, for each case: sequence, interaction, kind, time of a feedback."""
    day = "2026-03-0{} 00:00:00.000000"
    said = [
        (4, "i1", "thumbs_up", AHEAD),
        (5, "i1", "thumbs_down", day.format(3)),  # given after it, and from now on what counts
        (6, "i2", "thumbs_down", day.format(3)),
        (7, "i2", "thumbs_up", AHEAD),  # given last, and counts still
        (8, "i2", "thumbs_down", day.format(2)),  # logged late
        (9, "i3", "thumbs_down", AHEAD),
        (10, "i3", "thumbs_up", AHEAD),  # in the order in which they came
        (11, "waits", "thumbs_up", AHEAD),
    ]
    rows = [
        "INSERT INTO interactions (id, task, sequence, created_at, prompt, output, confidence) "
        f"VALUES ('{uid(name)}', 'notes', {sequence}, '{moment}', 'prompt {name}', 'answer', 0.9)"
        for sequence, name, moment in [(1, "i1", day.format(1)), (2, "i2", day.format(1)), (3, "i3", AHEAD)]
    ]
    rows += [
        "INSERT INTO feedback (id, task, sequence, interaction_id, created_at, kind) "
        f"VALUES ('{uid(str(sequence))}', 'notes', {sequence}, '{uid(name)}', '{moment}', '{kind}')"
        for sequence, name, kind, moment in said
    ]
    rows += [
        "INSERT INTO examples (interaction_id, task, sequence, content_hash, target, reward, confirmed, corrected) "
        f"VALUES ('{uid(name)}', 'notes', 9, 'hash', 'answer', {reward}, true, false)"
        for name, reward in [("i1", 0.9), ("i2", 0.9), ("i3", 0.9)]
    ]
    rows += ["INSERT INTO tallies VALUES ('notes', 'examples', 3), ('notes', 'rewarded', 3)"]
    migrate_to(url, "0007", [*rows, "UPDATE counters SET value = 11 WHERE name = 'events'"])
    database = connect(url)
    with database.write() as open_connection:
        assert recompute_marked(open_connection, "notes", default_reward) == 3
        assert recompute_marked(open_connection, "notes", default_reward) == 0
    now = datetime.now(UTC)
    with database.read() as open_connection:
        rewards = {}
        for name in ("i1", "i2", "i3"):
            found = find_interaction(open_connection, uid(name))
            rewards[name] = found.example.reward
            assert all(one.created_at < now for one in (found.interaction, *found.feedback))
            assert found.example.ingest_offset > 11  # so that the next snapshot has it
        assert {name: reward > 0 for name, reward in rewards.items()} == {"i1": False, "i2": True, "i3": True}
        (waiting,) = unmatched_feedback(open_connection, "notes", 5)
        assert waiting.created_at.replace(tzinfo=UTC) < now
        counts = counters(open_connection, "notes")
    assert (counts["examples"], counts["rewarded"]) == (3, 2)
    database.engine.dispose()


@pytest.mark.parametrize("moment", [AHEAD, "2026-03-01 00:00:00.000000"])
def test_a_store_of_nothing_but_times_in_the_future_is_repaired(url, moment):
    row = (
        "INSERT INTO interactions (id, task, sequence, created_at, prompt, output) "
        "VALUES ('{}', 'notes', 1, '{}', 'p', 'o')"
    )
    migrate_to(url, "0007", [row.format(uid("a"), moment)])
    database = connect(url)
    with database.read() as open_connection:
        found = find_interaction(open_connection, uid("a")).interaction.created_at
    assert found < datetime.now(UTC) + timedelta(seconds=1)
    assert (found.isoformat() == "2026-03-01T00:00:00+00:00") == (moment != AHEAD)
    database.engine.dispose()


def test_examples_of_several_feedback_events_are_resolved_again_by_the_majority(url):
    rows = [
        "INSERT INTO interactions (id, loop, ingest_offset, created_at, prompt, output) VALUES "
        + ", ".join(f"('{uid(name)}', 'notes', {n}, '2026-01-01', 'p', 'o')" for n, name in enumerate("abc", start=1)),
        "INSERT INTO examples (interaction_id, loop, ingest_offset, content_hash, target, reward, confirmed, corrected)"
        " VALUES " + ", ".join(f"('{uid(name)}', 'notes', 9, 'hash', 'o', 0.7, true, false)" for name in "abc"),
        'INSERT INTO feedback (id, loop, ingest_offset, interaction_id, created_at, kind, "user") VALUES '
        + ", ".join(
            f"('{uid(on + user)}', 'notes', {n}, '{uid(on)}', '2026-01-0{n - 3}', 'thumbs_{kind}', '{user}')"
            for n, (on, user, kind) in enumerate(
                [("a", "u", "up"), ("a", "v", "up"), ("a", "w", "down"), ("b", "u", "up"), ("b", "v", "down"),
                 ("c", "u", "down")], start=4,
            )
        ),
        "INSERT INTO loop_counters VALUES ('notes', 'examples', 3), ('notes', 'rewarded', 3)",
        "UPDATE counters SET value = 10 WHERE name = 'events'",
    ]  # fmt: skip
    migrate_to(url, "0010", rows)
    database = connect(url)
    with database.write() as open_connection:
        assert recompute_marked(open_connection, "notes", default_reward) == 2
        found = [find_interaction(open_connection, uid(name)).example for name in "abc"]
        assert [one and one.reward for one in found] == [1.0, None, 0.7]  # c has one event and is left as it was
        assert counters(open_connection, "notes") == {"examples": 2, "rewarded": 2}
    database.engine.dispose()


def test_the_request_of_a_job_moves_from_its_metadata_to_a_column(url):
    asked = {"model": "notes", "training_file": "file-1"}
    kept = json.dumps({"team": "a", "finetune.request": json.dumps(asked)}).replace(":", r"\:")  # no parameters
    columns = "id, loop, origin, created_by, settings, metadata, status, error, progress, created_at"
    row = (
        f"INSERT INTO training_jobs ({columns}) VALUES ('ftjob-{{0}}', 'notes', 'openai', 'key', '{{{{}}}}', '{{1}}', "
        "'completed', '', '{{}}', '2026-01-01')"
    )
    migrate_to(url, "0023", [row.format("a" * 24, kept), row.format("b" * 24, "{}")])
    database = connect(url)
    first, second = (find_job(database, f"ftjob-{letter * 24}") for letter in "ab")
    assert (first.request, first.metadata) == (asked, {"team": "a"})
    assert (second.request, second.metadata) == (None, {})
    database.engine.dispose()
