"""A snapshot writes only changes, and gives the same dataset as one that was written at once."""

import random
import shutil
import uuid

import dagster as dg
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import get_latest, set_latest, stage_folder
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import newest_offset, record
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline import snapshot as snapshots
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.records import Turn
from finetune_pipeline_tests.conftest import dataset_rows, feedback, interaction
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions


def add(loop, *events, database=None):
    with (database or connect()).write() as connection:
        record(connection, loop.name, events, default_reward)


def take(loop, database=None):
    """Take a snapshot as a run does: the pointer moves."""
    artifact, _ = snapshots.snapshot(loop, database or connect())
    set_latest(artifact.manifest, "a run")
    return artifact


def forget_last(loop):
    shutil.rmtree(stage_folder(loop.name, "runs"))


def rows(artifact, shard):
    return pq.read_table(artifact.path / shard).to_pylist()


def test_a_snapshot_writes_changes_and_links_the_rest(loop):
    add(loop, *corrected(["ash", "birch"]))
    first = take(loop)
    add(loop, *corrected(["cedar"]), feedback("late", "ash", "correction", 5, correction="ash never spoke"))
    second = take(loop)
    assert second.manifest.shards == ["records-0001.parquet", "records-0002.parquet"]
    assert (second.manifest.new, second.manifest.interactions, second.manifest.watermark) == (2, 3, 7)
    old, linked = first.path / "records-0001.parquet", second.path / "records-0001.parquet"
    assert old.stat().st_ino == linked.stat().st_ino
    assert [row["target"] for row in rows(second, "records-0002.parquet")] == ["ash never spoke", "cedar spoke"]
    kept = {
        row["completion"]
        for split in ("train", "validation")
        for row in dataset_rows(build_dataset(loop, second).path, split)
    }
    assert kept == {"ash never spoke", "birch spoke", "cedar spoke"}


def test_a_tie_of_users_takes_the_example_back(loop):
    add(loop, *corrected(["ash", "birch"]), interaction("cedar"), feedback("yes", "cedar", "thumbs_up", user="u"))
    first = take(loop)
    add(loop, feedback("no", "cedar", "thumbs_down", user="v"))
    second = take(loop)
    assert [rows(first, "records-0001.parquet")[-1]["target"]] == ["answer cedar"]
    assert [row["target"] for row in rows(second, "records-0002.parquet")] == [None]
    assert build_dataset(loop, first).manifest.train - build_dataset(loop, second).manifest.train == 1


def test_a_run_links_the_shards_of_an_earlier_run(loop, instance):
    keys = ["notes/raw_logs", "notes/curated_dataset"]
    for name, shards in [("ash", 1), ("birch", 2)]:
        add(loop, *corrected([f"{name} {n}" for n in range(8)]))
        assets = definitions(loop).resolve_asset_graph().assets_defs
        mine = [asset for asset in assets if {key.to_user_string() for key in asset.keys} & {*keys}]
        done = dg.materialize(mine, instance=instance)
        (event,) = [e for e in done.get_asset_materialization_events() if e.asset_key.path[-1] == "raw_logs"]
        metadata = event.materialization.metadata
        assert (metadata["shards"].value, metadata["rows of the newest shard"].value) == (shards, 8)
    assert get_latest(DatasetManifest, loop.name).manifest.inputs["raw_logs"] == metadata["version"].value


def test_without_changes_the_last_snapshot_is_returned(loop):
    add(loop, *corrected(["ash"]))
    first = take(loop)
    other = interaction("elsewhere").model_copy(update={"loop": "another"})
    with connect().write() as connection:
        record(connection, "another", [other], default_reward)
    assert take(loop) == first


def test_a_row_has_every_logged_field(loop):
    logged = interaction(
        "ash", history=(Turn(role="user", content="hello"),), validation_score=70, domain="forest", kind="note",
        retrieved_context="a tree", variant="challenger", flag="unsure", model="notes@v1.0.0", user="ann",
    )  # fmt: skip
    add(loop, logged)
    (row,) = rows(take(loop), "records-0001.parquet")
    assert row["history"] == [{"role": "user", "content": "hello"}]
    values = logged.model_dump()
    names = [
        "validation_score", "domain", "kind", "retrieved_context", "variant", "flag", "model", "user", "created_at",
    ]  # fmt: skip
    assert {name: row[name] for name in names} == {name: values[name] for name in names}
    assert row["target"] is None


def random_events(seed):
    """Return batches of events: conversations, feedback that is late or precedes its interaction, personal data."""
    choose = random.Random(seed)
    batches, asked = [], []
    for batch in range(6):
        events = []
        for n in range(choose.randint(1, 8)):
            name = f"{batch}-{n}"
            asked.append(name)
            turns = (Turn(role="user", content=f"about {choose.choice('abc')}"),) if choose.random() < 0.3 else ()
            prompt = f"{choose.choice('abcdef')} asks ann@example.com about matter {choose.randint(1, 12)}"
            events.append(interaction(name, prompt=prompt, history=turns))
        for n in range(choose.randint(0, 12)):
            on = choose.choice([*asked, f"{batch + 1}-0"])
            kind = choose.choice(["correction", "thumbs_up", "thumbs_down"])
            words = {"correction": f"answer {choose.randint(1, 5)}"} if kind == "correction" else {}
            events.append(feedback(f"f{batch}-{n}", on, kind, batch * 100 + n, **words))
        batches.append(events)
    return batches


@pytest.mark.parametrize("seed", range(3))
def test_shards_give_the_same_dataset_as_one_file(loop, seed):
    for events in random_events(seed):
        add(loop, *events)
        in_shards = take(loop)
    forget_last(loop)
    at_once = take(loop)
    assert len(in_shards.manifest.shards) > 2 and len(at_once.manifest.shards) == 1
    for split in ("train", "validation"):
        assert dataset_rows(build_dataset(loop, in_shards).path, split) == dataset_rows(
            build_dataset(loop, at_once).path, split
        )
    assert build_dataset(loop, in_shards).manifest.train > 3


def test_an_erasure_rewrites_the_snapshot(loop):
    add(loop, *corrected(["ash", "birch"]))
    take(loop)
    add(loop, *corrected(["cedar"]))
    take(loop)
    with connect().write() as connection:
        gone = {"id": str(uuid.uuid4()), "loop": "another", "ingest_offset": newest_offset(connection) + 1}
        connection.execute(t.erased_events.insert(), gone)
        connection.execute(
            sa.update(t.counters).where(t.counters.c.name == "events").values(value=gone["ingest_offset"])
        )
    assert len(take(loop).manifest.shards) == 2  # another loop's
    with connect().write() as connection:
        i, e = t.interactions.c, t.examples.c
        ash = connection.execute(sa.select(i.id).order_by(i.ingest_offset).limit(1)).scalar_one()
        connection.execute(t.interactions.delete().where(i.id == ash))
        connection.execute(t.examples.delete().where(e.interaction_id == ash))
        gone = {"id": ash, "loop": loop.name, "ingest_offset": newest_offset(connection) + 1}
        connection.execute(t.erased_events.insert(), gone)
        connection.execute(
            sa.update(t.counters).where(t.counters.c.name == "events").values(value=gone["ingest_offset"])
        )
    rewritten = take(loop)
    assert [row["target"] for shard in rewritten.manifest.shards for row in rows(rewritten, shard)] == [
        "birch spoke",
        "cedar spoke",
    ]
    assert take(loop) == rewritten


def test_other_reward_settings_rewrite_the_snapshot(loop, make_loop):
    add(loop, *corrected(["ash"]))
    take(loop)
    ratings = {**loop.feedback.ratings, "3": 0.4}
    other = make_loop(feedback={"ratings": ratings})
    add(loop, *corrected(["birch"]))
    assert len(take(other).manifest.shards) == 1
    assert take(other).manifest.new == 2


def test_too_many_shards_become_one(loop, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_SHARDS", 2)
    numbers = []
    for name in ["ash", "birch", "cedar", "dogwood"]:
        add(loop, *corrected([name]))
        numbers.append(len(take(loop).manifest.shards))
    assert numbers == [1, 2, 1, 2]


def test_a_damaged_last_snapshot_is_rewritten(loop):
    add(loop, *corrected(["ash"]))
    first = take(loop)
    (first.path / "records-0001.parquet").unlink()
    add(loop, *corrected(["birch"]))
    assert len(take(loop).manifest.shards) == 1


def test_a_snapshot_of_another_database_is_not_linked(loop, tmp_path):
    add(loop, *corrected(["ash", "birch"]))
    take(loop)
    other = connect(f"sqlite:///{tmp_path / 'other.db'}")
    with other.write() as connection:  # the databases of tests are copies of one, with its number
        connection.execute(t.counters.update().where(t.counters.c.name == "store").values(value=1))
    add(loop, *corrected(["cedar", "elm", "fir"]), database=other)  # and has grown past the first
    taken = take(loop, other)
    assert taken.manifest.shards == ["records-0001.parquet"]
    spoke = {row["target"] for row in rows(taken, "records-0001.parquet")}
    assert spoke == {"cedar spoke", "elm spoke", "fir spoke"}


def test_shards_are_copied_where_links_are_not_possible(loop, monkeypatch):
    add(loop, *corrected(["ash"]))
    take(loop)
    add(loop, *corrected(["birch"]))

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(snapshots.os, "link", refuse)
    second = take(loop)
    assert [len(rows(second, shard)) for shard in second.manifest.shards] == [1, 1]


def test_both_databases_find_the_same_changes(loop, db):
    add(loop, *corrected(["ash", "birch"]), database=db)
    take(loop, db)
    add(loop, feedback("late", "birch", "thumbs_down", 9), *corrected(["cedar"]), database=db)
    second = take(loop, db)
    assert [row["interaction_id"] for row in rows(second, second.manifest.shards[-1])] == [
        str(interaction(name).id) for name in ("birch", "cedar")
    ]


def test_changes_are_found_by_indexes(loop):
    add(loop, *corrected(["ash"]))
    statements = []
    with connect().read() as connection:
        sa.event.listen(connection, "before_cursor_execute", lambda *given: statements.append(given[2:4]))
        list(snapshots.interactions_with_examples(connection, loop.name, 10, 1))
        text, values = statements[0]
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)]
    assert not [step for step in plan if step.startswith("SCAN") and ("interactions" in step or "examples" in step)]
    assert [step for step in plan if "ix_interactions_loop_ingest_offset (loop=? AND ingest_offset>?" in step]
    assert [step for step in plan if "ix_examples_loop_ingest_offset (loop=? AND ingest_offset>?" in step]
