"""`finetune feedback` as people type it, in its own home."""

import html
import json
import select
import signal
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
BETTER = '{"element":"wall","material":"brick","thickness_mm":250}'


@pytest.fixture(autouse=True)
def on_each_database(url, monkeypatch):
    """Every test here runs on SQLite and, where a server is installed, on PostgreSQL."""
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)


@pytest.fixture
def free_text(monkeypatch):
    """Any text is a valid answer."""
    monkeypatch.setattr("finetune_pipeline.feedback.corrections.correction_problem", lambda *_: None)


def run(*arguments, code=0, input=None):
    result = CliRunner().invoke(finetune, ["feedback", *map(str, arguments)], input=input)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def log(*options):
    return run("log", "--prompt", "a wall", "--output", "{}", *options).stdout.strip()


def stored(id):
    with connect().read() as connection:
        return store.find_interaction(connection, UUID(id))


def test_an_interaction_is_logged_corrected_and_rated():
    id = log("--user", "u1", "--confidence", "0.4", "--model", f"{LOOP}@v1.0.0", "--context", "found")
    UUID(run("correct", id, BETTER, "--user", "u2").stdout.strip())
    run("rate", id, "4")
    run("rate", id, "gold")
    run("rate", id, "up")
    run("rate", id, "down")
    found = stored(id)
    logged = found.interaction
    assert (logged.prompt, logged.output, logged.user) == ("a wall", "{}", "u1")
    assert (logged.confidence, logged.model, logged.retrieved_context) == (0.4, f"{LOOP}@v1.0.0", "found")
    assert [item.kind for item in found.feedback] == ["correction", "rating", "rating", "thumbs_up", "thumbs_down"]
    assert [item.rating for item in found.feedback[1:3]] == ["4", "gold"]
    assert found.feedback[0].user == "u2"
    assert found.example.target == BETTER


def test_a_correction_can_come_from_a_file_or_the_terminal(free_text, tmp_path):
    path = tmp_path / "answer.json"
    path.write_text('{\n "element": "wall"\n}\n')
    id = log()
    run("correct", id, "--file", path)
    assert stored(id).example.target == '{\n "element": "wall"\n}'
    run("correct", id, "--file", "-", input="ünïcödé\n")
    assert stored(id).example.target == "ünïcödé"


@pytest.mark.parametrize("text", ["not json", '{"element": "spaceship"}'])
def test_a_correction_that_could_not_train_is_refused(text):
    id = log()
    said = run("correct", id, text, code=1).stderr
    assert said.startswith("Error: correction: ") and "the output schema of loop aec_parser does not accept it" in said
    assert stored(id).feedback == ()


def test_a_prompt_that_one_answer_has_names_the_latest_interaction():
    log()
    latest = log()
    run("correct", "A  wall", BETTER)
    run("rate", "wall", "up")
    assert [one.kind for one in stored(latest).feedback] == ["correction", "thumbs_up"]
    other = run("log", "--prompt", "a wall", "--output", "another").stdout.strip()
    said = run("correct", "a wall", BETTER, code=1).stderr
    assert "2 interactions have different conversations or answers" in said
    assert said.index(other) < said.index(latest)
    assert stored(other).feedback == ()


def test_interactions_are_listed_searched_and_shown():
    first = log("--user", "ann")
    second = run("log", "--prompt", "a door", "--output", "oak", "--user", "bob").stdout.strip()
    run("rate", first, "4", "--user", "bob")
    run("correct", first, BETTER, "--user", "cid")
    assert [line.split()[0] for line in run("list").stdout.splitlines()[::3]] == [second, first]
    assert first not in run("list", "--label", "unrated").stdout
    assert first in run("list", "--user", "cid").stdout and second not in run("list", "--user", "cid").stdout
    assert run("list", "--until", "2020-01-01").stdout == "" != run("list", "--since", "2020-01-01T10:00:00").stdout
    (found,) = json.loads(run("search", "BRICK", "--json").stdout)
    assert (
        found == json.loads(run("show", first, "--json").stdout) == json.loads(run("show", "a wall", "--json").stdout)
    )
    assert (found["interaction"]["user"], found["target"]) == ("ann", BETTER)
    assert [(one["kind"], one["user"]) for one in found["feedback"]] == [("rating", "bob"), ("correction", "cid")]
    assert found["feedback"][0]["reward"] == 0.7 and found["reward"] == found["feedback"][1]["reward"]
    shown = run("show", first).stdout
    assert "rating 4, reward +0.70, by bob" in shown and "example with reward +0." in shown and BETTER in shown
    run("rate", second, "up", "--user", "u")
    run("rate", second, "down", "--user", "v")
    assert "trains nothing: as much feedback for the answer as against it" in run("show", second).stdout


def test_events_are_followed_as_json_lines_with_rewards(own_home):
    ids = [log() for _ in range(3)]
    run("rate", ids[0], "4")
    events = [json.loads(line) for line in run("tail", "-n", "2").stdout.splitlines()]
    assert [event["event"] for event in events] == ["interaction", "feedback"]
    assert events[1]["reward"] == 0.7
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "feedback", "tail", "-f", "-n", "0"]
    # A background process of a script starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        following = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        # It may start after the first of these events, so one of them is the first that it sees.
        given = []
        while not given or select.select([following.stdout], [], [], 0.5)[0] == []:
            given.append(run("rate", ids[1], "down", "--key", f"k{len(given)}").stdout.strip())
        event = json.loads(following.stdout.readline())
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=60) == 0
    finally:
        following.kill()
        following.communicate()
    assert (event["kind"], event["reward"], event["id"] in given) == ("thumbs_down", -1.0, True)


def test_statistics_have_rewards_agreement_and_trainings():
    id = log()
    for user, value in [("u", "up"), ("v", "up"), ("w", "down")]:
        run("rate", id, value, "--user", user)
    other = run("log", "--prompt", "a door", "--output", "oak").stdout.strip()
    for user, value in [("u", "down"), ("v", "1")]:
        run("rate", other, value, "--user", user)
    said = run("stats").stdout
    values = {line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1] for line in said.splitlines() if line.strip()}
    assert (values["trainings"], values["average reward"]) == ("0", "+0.00")
    assert values["agreement of users (Krippendorff's alpha, nominal: for or against)"] == "0.33"
    assert values["answers that several users rated"] == "2"
    assert "  -1.0 to -0.8        1  ####" in said and "  +0.8 to +1.0        1  ####" in said


def test_a_key_makes_a_command_safe_to_repeat():
    id = log("--key", "k")
    assert log("--key", "k") == id
    assert run("correct", id, BETTER, "--key", "k").stdout == run("correct", id, BETTER, "--key", "k").stdout
    found = stored(id)
    assert len(found.feedback) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("log", "--prompt", "a", "--output", "b", "--confidence", "7"), "confidence: found 7.0, expected less than"),
        (("log", "--prompt", "", "--output", "b"), "prompt: is empty"),
        (("log", "--prompt", "a", "--output", "b", "--id", "../../x"), "found '../../x', expected a UUID"),
        (("correct", "../../x", "better"), "'../../x' is neither an id (a UUID) nor"),
        (("rate", "  ", "up"), "The id or prompt is empty"),
        (("show", "a wall"), "'a wall' is neither an id (a UUID) nor"),
        (("show", str(uid("a"))), f"no interaction {uid('a')}"),
        (("correct", str(uid("a")), " "), "needs the corrected answer"),
        (("correct", str(uid("a"))), "as TEXT or with --file"),
        (("correct", str(uid("a")), "x", "--file", "-"), "one of the two"),
        (("rate", str(uid("a")), "6"), "'6' is not one of '1', '2'"),
        (("export", "x.jsonl", "--min-reward", "0.5"), "--format alpaca"),
        (("export", "x.jsonl", "--format", "alpaca", "--min-reward", "7"), "7"),
    ],
)
def test_invalid_input_is_reported_in_a_line_and_not_stored(arguments, said, url):
    result = CliRunner().invoke(finetune, ["feedback", *arguments])
    assert result.exit_code in {1, 2}
    assert said in result.stderr and "Traceback" not in result.output
    assert FeedbackClient(LOOP).stats() == {}


def test_feedback_without_its_interaction_is_reported():
    result = run("rate", uid("nobody"), "up")
    assert "has not arrived; the feedback counts once it does" in result.stderr


def test_stats_count_by_kind_and_list_unmatched_feedback():
    id = log()
    run("correct", id, BETTER)
    run("rate", id, "up")
    FeedbackClient(LOOP).log("odd", "{}", flag="low confidence")
    waiting = run("rate", uid("nobody"), "down").stdout.strip()
    said = run("stats").stdout
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in said.splitlines() if line.split()}
    for name, value in {
        "interactions": "2", "feedback events": "3", "correction": "1", "thumbs_up": "1", "thumbs_down": "1",
        "examples": "1", "corrected by a person": "1", "flagged for review": "1", "unmatched feedback": "1",
    }.items():  # fmt: skip
        assert lines[name] == value, name
    assert f"{waiting}  thumbs_down on {uid('nobody')}, 0 minutes old" in said
    found = json.loads(run("stats", "--json").stdout)
    assert [found[name] for name in ("loop", "interactions", "feedback", "trainings")] == [LOOP, 2, 3, 0]
    assert found["by_kind"] == {"correction": 1, "thumbs_down": 1, "thumbs_up": 1}
    assert found["agreement"] == {"alpha": None, "answers": 0, "ratings": 0}
    assert sum(one["examples"] for one in found["histogram"]) == 1
    assert [(row["id"], row["kind"]) for row in found["unmatched_feedback"]] == [(waiting, "thumbs_down")]


def test_flagged_answers_are_listed_until_they_are_reviewed():
    FeedbackClient(LOOP).log("a\nwall", "{}", flag="low confidence", confidence=0.25)
    said = run("flagged").stdout
    assert "low confidence, confidence 0.25\n  prompt  a wall\n  output  {}\n" in said
    (found,) = json.loads(run("flagged", "--json").stdout)
    assert (found["id"], found["flag"], found["prompt"]) == (said.split()[0], "low confidence", "a\nwall")
    run("rate", said.split()[0], "up")
    assert (run("flagged", "--json").stdout, run("flagged", "--json").stderr) == ("[]\n", "")
    assert (run("flagged").stdout, run("flagged").stderr) == ("", f"no flagged answer of loop {LOOP} is unreviewed\n")
    FeedbackClient(LOOP).log("b", "{}", flag="confidence 0.25 is below 0.85", confidence=0.25)
    assert "  confidence 0.25 is below 0.85\n" in run("flagged").stdout


def test_stats_do_not_look_for_unmatched_feedback_if_there_is_none():
    run("rate", log(), "up")
    statements = []

    def note(_connection, _cursor, statement, *_rest):
        statements.append(statement)

    sa.event.listen(connect().engine, "before_cursor_execute", note)
    run("stats")
    assert any("loop_counters" in statement for statement in statements)
    assert not any("NOT (EXISTS" in statement for statement in statements)


def test_an_export_can_be_imported(tmp_path):
    id = log()
    run("rate", id, "up")
    path = tmp_path / "out.jsonl"
    assert run("export", path).stdout == f"2 events written to {path}\n"
    assert (
        "0 interactions and 0 feedback events added, 2 duplicates, 0 of 2 lines rejected" in run("import", path).stdout
    )
    alpaca = tmp_path / "out.json"
    assert "1 example written" in run("export", alpaca, "--format", "alpaca", "--min-reward", "0.5").stdout
    assert json.loads(alpaca.read_text())[0]["output"] == "{}"
    run("export", alpaca, "--format", "alpaca", "--force")


def test_an_export_says_what_it_left_out(tmp_path):
    log()
    given = interaction("a").model_copy(update={"loop": LOOP, "source": "notes", "provenance": "a.md"})
    with connect().write() as connection:
        store.record(connection, LOOP, [given], default_reward)
        store.retract(connection, LOOP, [str(given.id)])
    assert "1 event written" in (said := run("export", tmp_path / "out.jsonl").stdout)
    assert "left out 1 interaction of declared sources and dropped files" in said
    said = run("export", tmp_path / "out.json", "--format", "alpaca").stdout
    assert "0 examples" in said and "left out 1 that their source no longer has" in said


def test_exported_alpaca_holds_no_secrets_and_the_kinds_are_counted(free_text, tmp_path):
    id = run("log", "--prompt", "write to jane@example.com and bob@example.com", "--output", "{}").stdout.strip()
    run("correct", id, "her number is +49 30 901820")
    path = tmp_path / "out.json"
    said = run("export", path, "--format", "alpaca").stdout
    assert said == f"1 example written to {path}; replaced by placeholders: 2 email, 1 phone\n"
    (row,) = json.loads(path.read_text())
    assert (row["instruction"], row["output"]) == ("write to [EMAIL] and [EMAIL_2]", "her number is [PHONE]")
    assert "the raw record, with all secrets" in " ".join(run("export", "--help").stdout.split())


def test_import_names_the_rejected_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"prompt": "p", "output": "o", "reward": 0.9}\n{"prompt": "p", "output": "o", "reward": 7}\noops\n'
    )
    result = run("import", path)
    assert "1 interaction and 1 feedback event added, 0 duplicates, 2 of 3 lines rejected" in result.stdout
    assert f"{path}:2: reward: found 7, expected less than or equal to 1" in result.stderr
    assert f"{path}:3: not JSON" in result.stderr


def test_a_file_without_any_valid_line_is_an_error(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("oops\n" * 30)
    result = run("import", path, code=1)
    assert "and 10 more" in result.stderr and "could be imported" in result.stderr


def test_expected_errors_are_one_line_in_a_real_process(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "feedback", "export", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert result.returncode == 1
    assert result.stderr == f"Error: {path} exists already; name another file, or overwrite it with --force\n"


def snapshot_of(*ids):
    """A raw_logs artifact that holds these interactions."""
    with artifacts.draft(LOOP, "raw_logs", "abc") as folder:
        pq.write_table(pa.table({"interaction_id": [*ids]}), folder / "records.parquet")
        fields = {"loop": LOOP, "version": "abc", "inputs": {}, "settings": {}, "packages": {}, "interactions": 1,
                  "feedback": 0, "examples": 0, "watermark": 1, "shards": ["records.parquet"], "new": 1}  # fmt: skip
        return artifacts.publish(folder, RawLogsManifest, fields).path


def test_a_person_is_erased_and_what_was_made_with_it_is_listed():
    id = log("--user", "u1")
    run("correct", id, BETTER, "--user", "u2")
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
    assert (
        f"{LOOP}: 1 interaction, 2 feedback events, 0 review decisions and 0 excerpts of rejected lines deleted" in said
    )
    assert str(snapshot) in said and f"`finetune run --loop {LOOP}` makes new ones" in said
    assert str(inbox / "table.csv") in said and "other.csv" not in said
    assert str(inbox / "log.jsonl") in said and "delete them there, too" in said
    assert stored(id) is None and stored(other).example is None
    again = run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout
    assert "0 interactions, 0 feedback events" in again and str(snapshot) not in again


@pytest.mark.parametrize(
    "written",
    [
        ("benchmark.jsonl", lambda text: json.dumps({"prompt": text})),
        ("replay.jsonl", lambda text: json.dumps({"prompt": text}, ensure_ascii=False)),
        ("report/comparison.json", lambda text: json.dumps({"questions": [{"prompt": f"before {text}"}]})),
        ("report/report.html", lambda text: f"<td>{html.escape(text)}</td>"),
        ("report/report.md", str),
    ],
    ids=lambda written: written[0],
)
def test_benchmarks_and_reports_with_a_persons_texts_are_listed(tmp_path, monkeypatch, written):
    name, form = written
    loop = load_loop(LOOP)
    files = {"benchmark.jsonl": tmp_path / "benchmark.jsonl", "replay.jsonl": tmp_path / "replay.jsonl"}
    own = loop.model_copy(
        update={
            "evaluation": loop.evaluation.model_copy(update={"benchmark": files["benchmark.jsonl"]}),
            "curation": loop.curation.model_copy(update={"replay": files["replay.jsonl"]}),
        }
    )
    monkeypatch.setattr("finetune_pipeline.pipeline.erasure.load_loops", lambda: {LOOP: own})
    text = 'the "façade" of <Ann>\nis 240 mm'
    run("log", "--prompt", text, "--output", "{}", "--user", "u1")
    run("log", "--prompt", "another wall", "--output", "{}", "--user", "u2")
    path = files.get(name) or artifacts.stage_folder(LOOP, "eval_report") / "abc" / name.removeprefix("report/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{form('another wall')}\n{form(text)}\n", encoding="utf-8")
    said = run("erase", "--user", "u1", "--yes").stdout
    assert f"{path} (1 text)" in said and "Remove the questions" in said
    assert "(1 text)" not in run("erase", "--user", "u1", "--yes").stdout  # the texts are unknown now


def test_sources_that_may_still_contain_an_erased_person_are_listed():
    given = interaction("a", user="u1").model_copy(update={"loop": LOOP, "source": "notes", "provenance": "a.md"})
    with connect().write() as connection:
        store.record(connection, LOOP, [given], default_reward)
    said = run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout
    assert "the deleted data came from these sources, which may still contain it:\n    notes\n" in said
    assert "may still contain it" not in run("erase", "--user", "u1", "--yes", "--loop", LOOP).stdout


@pytest.mark.parametrize(
    ("prompt", "options", "said", "unsaid"),
    [
        ("a long prompt", [], "not reached: Dagster's history and the logs of runs", "rewrote"),
        ("a long prompt", [], "now, since after the erasure the texts are unknown", "rewrote"),
        ("a long prompt", ["--scrub-dagster"], "rewrote 0 rows and 1 log", "Only the name"),
        ("a wall", ["--scrub-dagster"], "not searched: 2 texts of fewer than 8 characters", "not reached: Dagster's"),
        (None, ["--scrub-dagster"], "Only the name was searched", "of fewer than"),
        (None, [], "not reached: Dagster's history and the logs of runs", "are unknown"),
    ],
)
def test_an_erasure_says_what_it_left_in_dagster(own_home, prompt, options, said, unsaid):
    if prompt:
        run("log", "--prompt", prompt, "--output", "{}", "--user", "u1")
    path = own_home / "logs" / "run.log"
    path.parent.mkdir(parents=True)
    path.write_text(f"rejected: {prompt!r}\n")
    output = run("erase", "--user", "u1", "--yes", *options).stdout
    assert said in output and unsaid not in output


def test_nothing_is_deleted_without_a_yes():
    id = log("--user", "u1")
    result = run("erase", "--user", "u1", input="n\n", code=1)
    assert "1 interaction, 0 feedback events and 0 review decisions" in result.output
    assert stored(id) is not None
    run("erase", "--user", "u1", input="y\n")
    assert stored(id) is None


def test_data_of_undeclared_loops_is_erased_too():
    gone = load_loop(LOOP).model_copy(update={"name": "gone"})
    id = FeedbackClient(gone).log("a", "b", user="u1")
    assert "gone: 1 interaction, 0 feedback events" in run("erase", "--user", "u1", "--yes").stdout
    assert stored(str(id)) is None


def test_events_in_a_killed_servers_log_are_erased_too():
    waiting = interaction("a", user="u1").model_copy(update={"loop": LOOP})
    write_ahead_log_folder().mkdir(parents=True)
    (write_ahead_log_folder() / f"{uid('server')}.jsonl").write_text(waiting.model_dump_json() + "\n")
    assert f"{LOOP}: 1 interaction" in run("erase", "--user", "u1", "--yes").stdout
    assert not list(write_ahead_log_folder().glob("*.jsonl"))
    with connect().write() as connection:
        assert store.record(connection, LOOP, [waiting], lambda *_: 0.0).interactions == 0


def test_events_in_a_running_servers_log_are_reported():
    id = log("--user", "u1")
    waiting = interaction("a", user="u1").model_copy(update={"loop": LOOP})
    write_ahead_log_folder().mkdir(parents=True)
    server = write_ahead_log_folder() / f"{uid('server')}.jsonl"
    server.write_text(waiting.model_dump_json() + "\n")
    with FileLock(f"{server}.lock"):
        result = run("erase", "--user", "u1", "--yes", code=1)
        assert stored(id) is None
        assert f"still be on their way into the store ({server})" in result.stderr and "Run this again" in result.stderr
        run("erase", "--user", "u2", "--yes")
    assert f"{LOOP}: 1 interaction" in run("erase", "--user", "u1", "--yes").stdout


def test_deleted_text_in_sqlites_own_log_is_reported(url):
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL has no such log")
    log("--user", "u1")
    other = sa.create_engine(url)
    with other.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT count(*) FROM interactions").all()
        result = run("erase", "--user", "u1", "--yes", code=1)
    assert "1 interaction, 0 feedback events" in result.stdout
    assert "still contains the deleted text. Run this again" in result.stderr
    other.dispose()
    run("erase", "--user", "u1", "--yes")


def test_weights_of_an_unpromoted_challenger_are_listed():
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
    assert f"{LOOP}: weights made with the deleted data:\n    {adapter}" in said
    assert f"`finetune model gc --keep 1 --loop {LOOP}`" in said


def test_a_source_is_retracted_by_name_after_a_question():
    loop = load_loop(LOOP)
    records = [SourceRecord(f"{n}.md", f"a wall of {n} mm", json.dumps({"element": "wall"})) for n in range(3)]
    feed = FilesSource(kind="files", name="notes", path="somewhere")
    sync_source(loop, feed, connect(), lambda source, cursor: iter(records))
    assert "Sources with active records: notes (3)" in run("retract", "--source", "nots", code=1).output
    assert "Retract 3 records of notes" in run("retract", "--source", "notes", code=1, input="n\n").output
    assert "3 records of notes retracted" in run("retract", "--source", "notes", "--yes").output
    assert "Sources with active records: none" in run("retract", "--source", "notes", code=1).output
