"""`finetune feedback` as people type it, on a home of its own."""

import json
import subprocess
import sys
from uuid import UUID

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from filelock import FileLock

from finetune_pipeline import artifacts
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.curation.dataset_files import COLUMNS
from finetune_pipeline.database import connect
from finetune_pipeline.feedback import FeedbackClient, store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.write_ahead_log import write_ahead_log_folder
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, RawLogsManifest
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.settings import PROJECT_ROOT, FilesSource, load_loop
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline_tests.conftest import interaction, uid

LOOP = "aec_parser"


@pytest.fixture(autouse=True)
def on_each_database(url, monkeypatch):
    """Every test here runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


def run(*arguments, code=0, input=None):
    result = CliRunner().invoke(finetune, ["feedback", *map(str, arguments)], input=input)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def log(*options):
    return run("log", "--prompt", "a wall", "--output", "{}", *options).stdout.strip()


def exchange(id):
    with connect().read() as connection:
        return store.find_interaction(connection, UUID(id))


def test_an_exchange_is_logged_corrected_and_rated():
    id = log("--user", "u1", "--confidence", "0.4", "--model", f"{LOOP}@v1.0.0", "--context", "found")
    UUID(run("correct", id, "better", "--user", "u2").stdout.strip())
    run("rate", id, "4")
    run("rate", id, "gold")
    run("rate", id, "up")
    run("rate", id, "down")
    found = exchange(id)
    logged = found.interaction
    assert (logged.prompt, logged.output, logged.user) == ("a wall", "{}", "u1")
    assert (logged.confidence, logged.model, logged.retrieved_context) == (0.4, f"{LOOP}@v1.0.0", "found")
    assert [item.kind for item in found.feedback] == ["correction", "rating", "rating", "thumbs_up", "thumbs_down"]
    assert [item.rating for item in found.feedback[1:3]] == ["4", "gold"]
    assert found.feedback[0].user == "u2"
    assert found.example.target == "better"


def test_a_correction_can_come_from_a_file_or_the_terminal(tmp_path):
    path = tmp_path / "answer.json"
    path.write_text('{\n "a": 1\n}\n')
    id = log()
    run("correct", id, "--file", path)
    assert exchange(id).example.target == '{\n "a": 1\n}'
    run("correct", id, "--file", "-", input="ünïcödé\n")
    assert exchange(id).example.target == "ünïcödé"


def test_a_key_makes_a_command_safe_to_repeat():
    id = log("--key", "k")
    assert log("--key", "k") == id
    assert run("correct", id, "x", "--key", "k").stdout == run("correct", id, "x", "--key", "k").stdout
    found = exchange(id)
    assert len(found.feedback) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("log", "--prompt", "a", "--output", "b", "--confidence", "7"), "confidence: found 7.0, expected less than"),
        (("log", "--prompt", "", "--output", "b"), "prompt: found ''"),
        (("log", "--prompt", "a", "--output", "b", "--id", "../../x"), "found '../../x', expected a UUID"),
        (("correct", "../../x", "better"), "interaction_id: found '../../x', expected a valid UUID"),
        (("correct", str(uid("a")), " "), "needs the corrected answer"),
        (("correct", str(uid("a"))), "as TEXT or with --file"),
        (("correct", str(uid("a")), "x", "--file", "-"), "one of the two"),
        (("rate", str(uid("a")), "6"), "'6' is not one of '1', '2'"),
        (("export", "x.jsonl", "--min-reward", "0.5"), "--format alpaca"),
        (("export", "x.jsonl", "--format", "alpaca", "--min-reward", "7"), "7"),
    ],
)
def test_wrong_input_is_told_in_a_line_and_nothing_is_kept(arguments, said, url):
    result = CliRunner().invoke(finetune, ["feedback", *arguments])
    assert result.exit_code in {1, 2}
    assert said in result.stderr and "Traceback" not in result.output
    assert FeedbackClient(LOOP).stats() == {}


def test_feedback_on_nothing_says_that_it_waits():
    result = run("rate", uid("nobody"), "up")
    assert "has not arrived; the feedback waits for it" in result.stderr


def test_stats_count_by_kind_and_name_what_waits():
    id = log()
    run("correct", id, "better")
    run("rate", id, "up")
    FeedbackClient(LOOP).log("odd", "{}", flag="low confidence")
    waiting = run("rate", uid("nobody"), "down").stdout.strip()
    said = run("stats").stdout
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in said.splitlines() if line.split()}
    for name, value in {
        "interactions": "2", "feedback": "3", "correction": "1", "thumbs_up": "1", "thumbs_down": "1", "examples": "1",
        "corrected by a person": "1", "flagged when answered": "1", "feedback without its interaction": "1",
    }.items():  # fmt: skip
        assert lines[name] == value, name
    assert f"{waiting}  thumbs_down on {uid('nobody')}, 0 minutes old" in said


def test_flagged_answers_are_listed_until_someone_has_looked():
    FeedbackClient(LOOP).log("a\nwall", "{}", flag="low confidence", confidence=0.25)
    said = run("flagged").stdout
    assert "low confidence, confidence 0.25\n  asked     a wall\n  answered  {}\n" in said
    run("rate", said.split()[0], "up")
    assert run("flagged").stdout == ""


def test_stats_do_not_go_through_the_feedback_when_none_waits():
    run("rate", log(), "up")
    statements = []

    def note(_connection, _cursor, statement, *_rest):
        statements.append(statement)

    sa.event.listen(connect().engine, "before_cursor_execute", note)
    run("stats")
    assert any("loop_counters" in statement for statement in statements)
    assert not any("FROM feedback" in statement for statement in statements)


def test_what_is_exported_can_be_imported(tmp_path):
    id = log()
    run("rate", id, "up")
    path = tmp_path / "out.jsonl"
    assert run("export", path).stdout == f"2 events written to {path}\n"
    assert "0 interactions and 0 feedback added, 2 known already, 0 of 2 lines rejected" in run("import", path).stdout
    alpaca = tmp_path / "out.json"
    assert "1 examples written" in run("export", alpaca, "--format", "alpaca", "--min-reward", "0.5").stdout
    assert json.loads(alpaca.read_text())[0]["output"] == "{}"
    run("export", alpaca, "--format", "alpaca", "--force")


def test_an_export_says_what_it_left_out(tmp_path):
    log()
    given = interaction("a").model_copy(update={"loop": LOOP, "source": "notes", "provenance": "a.md"})
    with connect().write() as connection:
        store.record(connection, LOOP, [given], default_reward)
        store.retract(connection, LOOP, [str(given.id)])
    assert "1 events written" in (said := run("export", tmp_path / "out.jsonl").stdout)
    assert "left out: 1 conversations of declared sources and dropped files" in said
    said = run("export", tmp_path / "out.json", "--format", "alpaca").stdout
    assert "0 examples" in said and "left out: 1 that their source no longer has" in said


def test_exported_alpaca_holds_no_secrets_and_the_kinds_are_counted(tmp_path):
    id = run("log", "--prompt", "write to jane@example.com and bob@example.com", "--output", "{}").stdout.strip()
    run("correct", id, "her number is +49 30 901820")
    path = tmp_path / "out.json"
    said = run("export", path, "--format", "alpaca").stdout
    assert said == f"1 examples written to {path}; replaced by placeholders: 2 email, 1 phone\n"
    (row,) = json.loads(path.read_text())
    assert (row["instruction"], row["output"]) == ("write to [EMAIL] and [EMAIL]", "her number is [PHONE]")
    assert "the raw record, with all secrets" in " ".join(run("export", "--help").stdout.split())


def test_import_names_what_it_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"prompt": "p", "output": "o", "reward": 0.9}\n{"prompt": "p", "output": "o", "reward": 7}\noops\n'
    )
    result = run("import", path)
    assert "1 interactions and 1 feedback added, 0 known already, 2 of 3 lines rejected" in result.stdout
    assert f"{path}:2: reward: found 7, expected less than or equal to 1" in result.stderr
    assert f"{path}:3: not JSON" in result.stderr


def test_a_file_of_which_nothing_can_be_read_is_an_error(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("oops\n" * 30)
    result = run("import", path, code=1)
    assert "and 10 more" in result.stderr and "could be read" in result.stderr


def test_expected_errors_are_one_line_in_a_real_process(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "feedback", "export", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert result.returncode == 1
    assert result.stderr == f"error: {path} is there already; name another file, or overwrite it with --force\n"


def snapshot_of(*ids):
    """A raw_logs artifact that holds these interactions."""
    with artifacts.draft(LOOP, "raw_logs", "abc") as folder:
        pq.write_table(pa.table({"interaction_id": [*ids]}), folder / "records.parquet")
        fields = {"loop": LOOP, "version": "abc", "inputs": {}, "settings": {}, "packages": {}, "interactions": 1,
                  "feedback": 0, "examples": 0, "watermark": 1, "shards": ["records.parquet"], "new": 1}  # fmt: skip
        return artifacts.publish(folder, RawLogsManifest, fields).path


def test_a_person_is_forgotten_and_what_was_made_with_it_is_named():
    id = log("--user", "u1")
    run("correct", id, "better", "--user", "u2")
    other = log("--user", "u2")
    run("rate", other, "down", "--user", "u1")
    snapshot = snapshot_of(id)
    inbox = load_loop(LOOP).drop_folder
    inbox.mkdir(parents=True)
    (inbox / "log.jsonl").write_text('{"event": "interaction", "user": "u1"}\n')
    (inbox / "table.csv").write_text("prompt,completion,user\np,c,u1\n")
    (inbox / "other.csv").write_text("prompt,completion,user\nu1,c,u11\n")
    (inbox / "others.jsonl").write_text('{"event": "interaction", "user": "u11", "prompt": "u1"}\n')
    said = run("erase", "--user", "u1", "--yes").stdout
    assert f"{LOOP}: 1 interactions, 2 feedback, 0 review decisions and 0 excerpts of rejected lines deleted" in said
    assert str(snapshot) in said and f"`finetune run --loop {LOOP}` makes new ones" in said
    assert str(inbox / "table.csv") in said and "other.csv" not in said
    assert str(inbox / "log.jsonl") in said and "delete it there too" in said
    assert exchange(id) is None and exchange(other).example is None
    again = run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout
    assert "0 interactions, 0 feedback" in again and str(snapshot) not in again


def test_sources_that_may_still_hold_a_forgotten_person_are_named():
    given = interaction("a", user="u1").model_copy(update={"loop": LOOP, "source": "notes", "provenance": "a.md"})
    with connect().write() as connection:
        store.record(connection, LOOP, [given], default_reward)
    said = run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout
    assert "these sources gave what was deleted, and may hold it still:\n    notes\n" in said
    assert "may hold it still" not in run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout


def test_nothing_is_deleted_without_a_yes():
    id = log("--user", "u1")
    result = run("erase", "--user", "u1", input="n\n", code=1)
    assert "1 interactions, 0 feedback and 0 review decisions" in result.output
    assert exchange(id) is not None
    run("erase", "--user", "u1", input="y\n")
    assert exchange(id) is None


def test_loops_that_are_declared_no_more_are_forgotten_too():
    gone = load_loop(LOOP).model_copy(update={"name": "gone"})
    id = FeedbackClient(gone).log("a", "b", user="u1")
    assert "gone: 1 interactions, 0 feedback" in run("erase", "--user", "u1", "--yes").stdout
    assert exchange(str(id)) is None


def test_what_waits_in_a_dead_servers_journal_is_forgotten_with_the_rest():
    waiting = interaction("a", user="u1").model_copy(update={"loop": LOOP})
    write_ahead_log_folder().mkdir(parents=True)
    (write_ahead_log_folder() / f"{uid('server')}.jsonl").write_text(waiting.model_dump_json() + "\n")
    assert f"{LOOP}: 1 interactions" in run("erase", "--user", "u1", "--yes").stdout
    assert not list(write_ahead_log_folder().glob("*.jsonl"))
    with connect().write() as connection:
        assert store.record(connection, LOOP, [waiting], lambda *_: 0.0).interactions == 0


def test_what_a_living_server_has_not_brought_into_the_store_is_told():
    id = log("--user", "u1")
    waiting = interaction("a", user="u1").model_copy(update={"loop": LOOP})
    write_ahead_log_folder().mkdir(parents=True)
    journal = write_ahead_log_folder() / f"{uid('server')}.jsonl"
    journal.write_text(waiting.model_dump_json() + "\n")
    with FileLock(f"{journal}.lock"):
        result = run("erase", "--user", "u1", "--yes", code=1)
        assert exchange(id) is None
        assert (
            f"still be on their way into the store ({journal})" in result.stderr and "Run this again" in result.stderr
        )
        run("erase", "--user", "u2", "--yes")
    assert f"{LOOP}: 1 interactions" in run("erase", "--user", "u1", "--yes").stdout


def test_what_another_program_keeps_in_sqlites_log_is_told(url):
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL has no such log")
    log("--user", "u1")
    other = sa.create_engine(url)
    with other.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT count(*) FROM interactions").all()
        result = run("erase", "--user", "u1", "--yes", code=1)
    assert "1 interactions, 0 feedback" in result.stdout
    assert "still holds the deleted text. Run this again" in result.stderr
    other.dispose()
    run("erase", "--user", "u1", "--yes")


def test_weights_of_a_challenger_that_was_never_promoted_are_named():
    id = log("--user", "u1")
    common = {"loop": LOOP, "version": "abc", "settings": {}, "packages": {}, "watermark": 1}
    with artifacts.draft(LOOP, "curated_dataset", "abc") as folder:
        rows = {
            "train": datasets.Dataset.from_dict({"interaction_id": [id]}),
            "validation": datasets.Dataset.from_dict({"interaction_id": [str(uid("other"))]}),
        }
        for name in COLUMNS:
            datasets.DatasetDict(rows).save_to_disk(folder / name, num_shards=dict.fromkeys(rows, 1))
        artifacts.publish(folder, DatasetManifest, {**common, "inputs": {}, "train": 1, "validation": 1, "replayed": 0,
                                                    "left_out": {}, "redacted": {}, "near_benchmark": [],
                                                    "preference_pairs": 0, "desirable": 0,
                                                    "undesirable": 0})  # fmt: skip
    with artifacts.draft(LOOP, "lora_adapter", "abc") as folder:
        fields = {"inputs": {"curated_dataset": "abc"}, "base_model": "b", "base_hash": "b", "mode": "full", "steps": 1,
                  "device": "cpu", "examples": 1, "too_long": 0, "loss_before": 1, "loss_after": 1, "train_loss": 1,
                  "tokens_per_second": 1, "wall_seconds": 1, "peak_memory_bytes": 1}  # fmt: skip
        adapter = artifacts.publish(folder, AdapterManifest, {**common, **fields}).path
    said = run("erase", "--user", "u1", "--yes").stdout
    assert f"{LOOP}: weights made with it:\n    {adapter}" in said
    assert f"`finetune model gc --keep 1 --loop {LOOP}`" in said


def test_what_a_source_gave_is_withdrawn_by_name_after_a_question():
    loop = load_loop(LOOP)
    records = [SourceRecord(f"{n}.md", f"a wall of {n} mm", json.dumps({"element": "wall"})) for n in range(3)]
    feed = FilesSource(kind="files", name="notes", path="somewhere")
    sync_source(loop, feed, connect(), lambda source, cursor: iter(records))
    assert "sources of which something does: notes (3)" in run("retract", "--source", "nots", code=1).output
    assert "Have the 3 records of notes" in run("retract", "--source", "notes", code=1, input="n\n").output
    assert "3 records of notes retracted" in run("retract", "--source", "notes", "--yes").output
    assert "sources of which something does: none" in run("retract", "--source", "notes", code=1).output
