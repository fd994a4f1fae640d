"""A cycle that looks at new logs only gives the dataset that a full one gives, file by file."""

import shutil

from finetune_pipeline.artifacts import point
from finetune_pipeline.curation import sifted
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.loop.curating import dataset
from finetune_pipeline.loop.raw_logs import snapshot
from finetune_pipeline.settings import home

from .conftest import corrected


def take(loop, *names):
    with connect().write() as connection:
        record(connection, loop.name, corrected(names), default_reward)
    artifact, _ = snapshot(loop, connect())
    point(artifact.manifest, "a run")  # the next snapshot builds on it
    return artifact


def test_a_new_cycle_looks_at_the_new_part_only_and_gives_what_a_full_one_gives(loop, make_loop, monkeypatch):
    looked = []
    real = sifted.chunked
    monkeypatch.setattr(sifted, "chunked", lambda part: looked.append(part.rows.name) or real(part))
    dataset(loop, take(loop, "ash", "birch", "cedar", "elm"))
    logs = take(loop, "fir", "oak")
    second = dataset(loop, logs)
    assert looked == ["records-0001.parquet", "records-0002.parquet"]
    shutil.rmtree(home() / "cache")
    shutil.rmtree(second.path)
    full = dataset(loop, logs)
    assert looked[2:] == ["records-0001.parquet", "records-0002.parquet"]
    assert full.manifest.files == second.manifest.files
    # What says nothing of an example by itself costs no second look; what does, costs one.
    dataset(make_loop(curation={**loop.curation.model_dump(), "validation_share": 0.5}), logs)
    assert len(looked) == 4
    dataset(make_loop(curation={**loop.curation.model_dump(), "min_reward": 0.1}), logs)
    assert len(looked) == 6
