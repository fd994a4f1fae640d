"""A cycle that looks at new logs only gives the dataset that a full one gives, file by file."""

import json
import shutil

from tokenizers import Tokenizer, models, pre_tokenizers

from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.curation import sifted, sifting
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


def test_a_new_cycle_looks_at_the_new_part_only_and_gives_what_a_full_one_gives(loop, make_loop, monkeypatch):
    looked = []
    real = sifted.chunked
    monkeypatch.setattr(sifted, "chunked", lambda part: looked.append(part.rows.name) or real(part))
    build_dataset(loop, take(loop, "ash", "birch", "cedar", "elm"))
    logs = take(loop, "fir", "oak")
    second = build_dataset(loop, logs)
    assert looked == ["records-0001.parquet", "records-0002.parquet"]
    shutil.rmtree(home() / "cache")
    shutil.rmtree(second.path)
    full = build_dataset(loop, logs)
    assert looked[2:] == ["records-0001.parquet", "records-0002.parquet"]
    assert full.manifest.files == second.manifest.files
    # What says nothing of an example by itself costs no second look; what does, costs one.
    build_dataset(make_loop(curation={**loop.curation.model_dump(), "validation_fraction": 0.5}), logs)
    assert len(looked) == 4
    build_dataset(make_loop(curation={**loop.curation.model_dump(), "min_reward": 0.1}), logs)
    assert len(looked) == 6
    # A release that looks otherwise uses neither what was found before nor the dataset of it.
    monkeypatch.setattr(sifting, "FORM", sifting.FORM + 1)
    assert build_dataset(loop, logs).manifest.version != full.manifest.version
    assert len(looked) == 8


def test_what_goes_away_and_comes_back_over_and_over_gives_the_same_from_a_cold_cache(make_loop):
    feed = {"kind": "files", "name": "imported", "path": "somewhere"}
    loop = make_loop(sources=[feed], curation={"min_examples": 1, "validation_fraction": 0.0})
    ash, birch, cedar = (
        SourceRecord(name, f"what did {name} say of it?", f"{name} spoke") for name in ("ash", "birch", "cedar")
    )
    for records in ([ash, birch], [ash], [ash, birch], [ash], [ash, birch, cedar]):
        sync_source(loop, loop.sources[0], connect(), lambda source, cursor, records=records: iter(records))
        logs, _ = snapshot(loop, connect())
        set_latest(logs.manifest, "a run")
        warm = build_dataset(loop, logs)
    parts = [logs.manifest.files[part].sha256 for part in logs.manifest.shards]
    assert len(set(parts)) < len(parts), "two cycles withdrew the same"
    assert warm.manifest.train == 3
    shutil.rmtree(home() / "cache")
    shutil.rmtree(warm.path)
    assert build_dataset(loop, logs).manifest.files == warm.manifest.files


def test_a_question_of_the_benchmark_is_known_again_after_its_redaction(make_loop, tmp_path):
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
