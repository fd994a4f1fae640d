"""Removing a person's texts from Dagster's history, in a real instance with events of an earlier version."""

import json

import dagster as dg
import pytest
import sqlalchemy as sa

from finetune_pipeline.orchestration.scrub import ERASED, clean_value, cleaner, scrub, scrub_home, scrub_tables
from finetune_pipeline.settings import RedactionSettings, home

PROMPT = 'Ann asked: "which wall\tfor the façade?" ' + "and more, " * 20 + "or less"
OTHER = "Bob asked which roof to take for the hall"
CARD = f"# Dataset v1 of notes\n\n12 examples\n\n## Sample\n\n```json\n{json.dumps({'prompt': OTHER})}\n```\n"


@dg.asset(check_specs=[dg.AssetCheckSpec("overlap", asset="dataset")])
def dataset(context: dg.AssetExecutionContext):
    context.log.info(f"rejected: {PROMPT!r}")
    context.log.info(f"log.jsonl:3: found {json.dumps(PROMPT)[:60]}...")
    print(PROMPT)  # into the compute logs
    check = dg.AssetCheckResult(check_name="overlap", passed=False, metadata={"first": [PROMPT, "of others"]})
    metadata = {"card": dg.MetadataValue.md(CARD), "sample": {"prompt": PROMPT, "by": "Ann"}, "rows": 12}
    yield dg.MaterializeResult(metadata=metadata, check_results=[check])


def content(folder):
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_history_stays_without_the_texts(instance, tmp_path):
    run = dg.materialize([dataset], instance=instance, tags={"by": "Ann", "for": "Annabel"})
    folder = tmp_path / "dagster"
    assert content(folder).count(b"which wall") > 3 and b"Bob asked" in content(folder)
    done = scrub(instance, folder, cleaner(["Ann"], [PROMPT, "short"], [DEFAULT]))
    assert done.rows["event_logs"] > 2 and done.rows["asset_keys"] == 1 and done.rows["asset_check_executions"] == 1
    left = content(folder)
    assert [text for text in (b"which wall", b"and more", b"Bob asked", b"Ann ") if text in left] == []
    assert scrub(instance, folder, cleaner(["Ann"], [PROMPT], [DEFAULT])).rows == {}
    event = instance.get_latest_materialization_event(dg.AssetKey("dataset"))
    metadata = event.asset_materialization.metadata
    assert metadata["card"].value == "# Dataset v1 of notes\n\n12 examples\n"
    assert metadata["sample"].value == {"prompt": ERASED, "by": ERASED} and metadata["rows"].value == 12
    record = instance.get_run_record_by_id(run.run_id)
    assert record.dagster_run.is_success and record.dagster_run.tags["for"] == "Annabel"
    (check,) = [
        e for e in instance.all_logs(run.run_id) if e.dagster_event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    found = check.dagster_event.asset_check_evaluation_data
    assert not found.passed and found.metadata["first"].value == [ERASED, "of others"]


DEFAULT = RedactionSettings()
ALL = RedactionSettings(ipv4=True, ipv6=True, mac=True)
LONG = "please note what was said about the budget of the whole project"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"before {LONG} after", f"before {ERASED} after"),
        (f"{LONG[:50]}... (cut)", f"{ERASED}... (cut)"),
        (f"{LONG[:45]}|{LONG}", f"{ERASED}|{ERASED}"),
        (LONG[:30], LONG[:30]),  # too little to be certain
        ("Ann, Anna, ann and (Ann)", f"{ERASED}, Anna, ann and ({ERASED})"),
        ("a wall", "a wall"),
        ("the key is [EMAIL] of the team", f"{ERASED} of the team"),
        ("from [EMAIL] to [EMAIL_2], then from [EMAIL] to [EMAIL]", f"{ERASED}, then {ERASED}"),
        ("host [IPV4] of the team", f"{ERASED} of the team"),  # a kind that is not redacted by default
        ("# Dataset v\n\nx\n\n## Sample\n\ny", "# Dataset v\n\nx\n"),
    ],
)
def test_texts_are_found_where_they_were_cut_or_redacted(text, cleaned):
    texts = [LONG, "a wall", "the key is ann@example.com", "host 10.1.2.3", "from a@x.io to b@x.io"]
    assert cleaner(["Ann"], texts, [DEFAULT, ALL])(text) == cleaned


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        ({"Ann": 1, "of Ann": {"b": "Ann"}}, {ERASED: 1, f"of {ERASED}": {"b": ERASED}}),
        ({"__class__": "Event", "Ann": {"Ann": 1}}, {"__class__": "Event", "Ann": {ERASED: 1}}),  # a field of Dagster's
        ([{"nested": json.dumps({"Ann": 1})}], [{"nested": json.dumps({ERASED: 1})}]),
    ],
)
def test_keys_of_json_are_cleaned(value, cleaned):
    assert json.loads(clean_value(json.dumps(value), cleaner(["Ann"], [], []))) == cleaned


def test_logs_of_runs_are_cleaned(own_home, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    log = home() / "logs" / "notes-1.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"rejected: {LONG!r} by Ann\n")
    assert scrub_home(["Ann"], [LONG], [DEFAULT]).logs == (log,)
    assert log.read_text() == f"rejected: '{ERASED}' by {ERASED}\n"


def test_every_database_is_rewritten_by_its_rows(url):
    engine = sa.create_engine(url)
    table = sa.Table(
        "event_logs", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("event", sa.Text)
    )
    nested = json.dumps({"md_str": json.dumps({"prompt": LONG}), "n": 1})
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"event": text} for text in (nested, "by Ann", "of others", None)])
        assert scrub_tables(connection, cleaner(["Ann"], [LONG], [DEFAULT])) == {"event_logs": 2}
        found = connection.execute(sa.select(table.c.event).order_by(table.c.id)).scalars().all()
    assert json.loads(json.loads(found[0])["md_str"]) == {"prompt": ERASED}
    assert found[1:] == [f"by {ERASED}", "of others", None]
    engine.dispose()
