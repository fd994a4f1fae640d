"""Datasets are built from new shards and cached results; each has the files that a full build gives."""

import json
import shutil

from tokenizers import Tokenizer, models, pre_tokenizers

from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.curation import filter
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.settings import home
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline_tests.conftest import dataset_rows, feedback, interaction, uid
from finetune_pipeline_tests.orchestration.conftest import corrected


def take(loop, *names):
    with connect().write() as connection:
        record(connection, loop.name, corrected(names), default_reward)
    artifact, _ = snapshot(loop, connect())
    set_latest(artifact.manifest, "a run")  # the next snapshot builds on it
    return artifact


def test_a_new_dataset_filters_new_shards_only_and_equals_a_full_build(loop, make_loop, monkeypatch):
    filtered = []
    real = filter.chunks_of
    monkeypatch.setattr(filter, "chunks_of", lambda shard: filtered.append(shard.path.name) or real(shard))
    build_dataset(loop, take(loop, "ash", "birch", "cedar", "elm"))
    logs = take(loop, "fir", "oak")
    second = build_dataset(loop, logs)
    assert filtered == ["records-0001.parquet", "records-0002.parquet"]
    shutil.rmtree(home() / "cache")
    shutil.rmtree(second.path)
    full = build_dataset(loop, logs)
    assert filtered[2:] == ["records-0001.parquet", "records-0002.parquet"]
    assert full.manifest.files == second.manifest.files
    # A setting of the selection leaves the cached results valid, a setting of the filter does not.
    build_dataset(make_loop(curation={**loop.curation.model_dump(), "validation_fraction": 0.5}), logs)
    assert len(filtered) == 4
    build_dataset(make_loop(curation={**loop.curation.model_dump(), "min_reward": 0.1}), logs)
    assert len(filtered) == 6
    # A release that filters differently uses neither the cached results nor the dataset of the old one.
    monkeypatch.setattr(filter, "CODE_VERSION", filter.CODE_VERSION + 1)
    assert build_dataset(loop, logs).manifest.version != full.manifest.version
    assert len(filtered) == 8


def test_records_that_go_and_return_give_the_same_from_a_cold_cache(make_loop):
    source = {"kind": "files", "name": "imported", "path": "somewhere"}
    loop = make_loop(sources=[source], curation={"min_examples": 1, "validation_fraction": 0.0})
    ash, birch, cedar = (
        SourceRecord(name, f"what did {name} say of it?", f"{name} spoke") for name in ("ash", "birch", "cedar")
    )
    for records in ([ash, birch], [ash], [ash, birch], [ash], [ash, birch, cedar]):
        sync_source(loop, loop.sources[0], connect(), lambda source, cursor, records=records: iter(records))
        logs, _ = snapshot(loop, connect())
        set_latest(logs.manifest, "a run")
        warm = build_dataset(loop, logs)
    shards = [logs.manifest.files[shard].sha256 for shard in logs.manifest.shards]
    assert len(set(shards)) < len(shards), "two cycles retracted the same"
    assert warm.manifest.train == 3
    shutil.rmtree(home() / "cache")
    shutil.rmtree(warm.path)
    assert build_dataset(loop, logs).manifest.files == warm.manifest.files


def test_a_benchmark_question_is_recognized_after_its_redaction(make_loop, tmp_path):
    question = "Send the invoice to ann.smith@example.com today"
    row = {"id": "q1", "slice": "mail", "prompt": question, "expected": "sent"}
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(row) + "\n")
    loop = make_loop(curation={"min_examples": 1, "validation_fraction": 0.0})
    events = [*corrected(["ash"]), interaction("ann", prompt=question)]
    events.append(feedback("on ann", "ann", "correction", correction="sent"))
    with connect().write() as connection:
        record(connection, loop.name, events, default_reward)
    made = build_dataset(loop, snapshot(loop, connect())[0])
    assert list(made.manifest.near_benchmark) == [str(uid("ann"))]
    assert "invoice" not in str(dataset_rows(made.path, "train"))


def test_another_tokenizer_under_the_same_path_gives_another_dataset(make_loop, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    cur = {"min_examples": 1, "validation_fraction": 0.0, "max_answer_tokens": 3}
    loop = make_loop(curation=cur, base_model=str(base))

    def tokenizer(split):
        made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        made.pre_tokenizer = split
        made.save(str(base / "tokenizer.json"))

    tokenizer(pre_tokenizers.Whitespace())
    logs = take(loop, "ash", "birch")
    words = build_dataset(loop, logs).manifest
    tokenizer(pre_tokenizers.Split("", "isolated"))
    letters = build_dataset(loop, logs).manifest
    assert (words.train, letters.train) == (2, 0)
    assert words.version != letters.version
