"""The filter over the shards of a snapshot: in processes, on Ray, and with cached results; always the same dataset."""

import logging
import os
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation import dataset, filter, snapshot
from finetune_pipeline.curation.acceptance import Policy
from finetune_pipeline.curation.dataset import curate
from finetune_pipeline.curation.dataset_files import PROVENANCE_FILE
from finetune_pipeline.curation.filter import FilterCache
from finetune_pipeline.pipeline.loop_files import identity
from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings

from ..conftest import needs_ray
from .datasets import (
    ALL_TRAIN,
    POLICY,
    corrected,
    disliked,
    example,
    read_built,
    table_of,
    turns,
    write_shards,
)


def logs(start, end):
    """Yield examples of many kinds."""
    for n in range(start, end):
        yield example(n, prompt=f"request {n // 2} for a wall of the kind {n // 2 * 7919 % 1009}", target=f"{n // 4}")
    yield corrected(10_000 + start, prompt=f"mail ann@example.com about {start}", history=turns("hello", "hi"))
    yield disliked(20_000 + start)
    yield example(30_000 + start, prompt="The golden question of ALL!")


def built(folder, paths, policy=POLICY, cache=None):
    return read_built(folder, curate(folder, paths, [], policy, identity, system_prompt="Answer.", cache=cache))


def test_shards_give_the_same_dataset_as_one_file(tmp_path):
    shards = [list(logs(0, 300)), list(logs(300, 400))]
    one = built(tmp_path / "one", write_shards(tmp_path / "in-one", [*shards[0], *shards[1]]))
    two = built(tmp_path / "two", write_shards(tmp_path / "in-two", *shards))
    assert one == two and len(two.train) > 100
    assert sorted(name for name in two.files if name.startswith("prompt_completion/")) == [
        "prompt_completion/dataset_dict.json",
        *(f"prompt_completion/{split}/{name}" for split in ("train", "validation") for name in
          ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")),
    ]  # fmt: skip
    assert not list((tmp_path / "two").glob(".*")), "nothing temporary is left"


def test_long_rows_are_read_in_windows_that_fit_into_memory(tmp_path, monkeypatch):
    shards = [list(logs(0, 300)), [example(400, history=turns("ü" * 3_000, "hi")), *logs(300, 400)]]
    paths = write_shards(tmp_path / "in", *shards)
    whole = built(tmp_path / "a", paths)
    windows = []

    def take(self, indices, columns, real=snapshot.Snapshot.take):
        table = real(self, indices, columns)
        if "history" in columns:
            rows = table.to_pylist()
            texts = [row["prompt"] + "".join(turn["content"] for turn in row["history"] or ()) for row in rows]
            windows.append((len(texts), sum(len(text.encode()) for text in texts)))
        return table

    monkeypatch.setattr(dataset, "_WINDOW_BYTES", 3_000)
    monkeypatch.setattr(snapshot.Snapshot, "take", take)
    in_windows = built(tmp_path / "b", paths)
    # The lines of provenance.csv are in another order: each window writes its train examples, then its validation.
    assert {**in_windows.files, PROVENANCE_FILE: ""} == {**whole.files, PROVENANCE_FILE: ""}
    one, other = (sorted((tmp_path / name / PROVENANCE_FILE).read_text().splitlines()) for name in ("a", "b"))
    assert one == other
    assert all(size <= 3_000 or rows == 1 for rows, size in windows)
    assert max(rows for rows, _ in windows) > 10 and len(windows) > 5


def test_a_later_shard_replaces_the_row_of_an_interaction(tmp_path):
    early = [example(1, target="early"), example(2), example(3)]
    late = [example(1, target="late"), example(2, reward=-0.5)]
    retracted = table_of([example(3)]).to_pylist()[0] | dict.fromkeys(["target", "reward", "confirmed", "corrected"])
    paths = write_shards(tmp_path / "in", early, late, [])
    pq.write_table(pa.Table.from_pylist([retracted], snapshot.schema()), paths[2])
    found = built(tmp_path / "out", paths, ALL_TRAIN)
    assert [(row.prompt, row.completion) for row in found.train] == [("prompt number 1", "late")]
    assert found.summary.left_out == {"reward below 0.3": 1}


def test_cached_shards_are_not_filtered_again(tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "in", logs(0, 200), logs(200, 260), logs(260, 300))
    folder, seen = tmp_path / "cache", []
    real = filter.filter_chunk

    def filter_chunk(chunk, policy, identity):
        seen.append(chunk.shard.path.name)
        return real(chunk, policy, identity)

    monkeypatch.setattr(filter, "filter_chunk", filter_chunk)
    built(tmp_path / "first", paths[:2], cache=FilterCache(folder, ["a", "b"]))
    assert seen == ["shard-0.parquet", "shard-1.parquet"]
    third = built(tmp_path / "third", paths, cache=FilterCache(folder, ["a", "b", "c"]))
    assert seen[2:] == ["shard-2.parquet"]
    assert third == built(tmp_path / "full", paths)
    built(tmp_path / "last", paths[2:], cache=FilterCache(folder, ["c"]))
    assert [path.name for path in folder.iterdir()] == ["c.arrow"], "results of other shards are deleted"


def test_identical_shards_each_have_their_own_rows(tmp_path):
    first, second = list(logs(0, 60)), list(logs(60, 90))
    paths = write_shards(tmp_path / "in", first, second, first, logs(90, 120), second)
    assert hash_file(paths[0]) == hash_file(paths[2])
    cache = FilterCache(tmp_path / "cache", ["a", "b", "a", "c", "b"])
    cold = built(tmp_path / "cold", paths, cache=cache)
    assert cold == built(tmp_path / "warm", paths, cache=cache) == built(tmp_path / "none", paths)


def test_another_run_may_delete_cached_results_at_any_moment(tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "in", logs(0, 60), logs(60, 90))
    folder, real = tmp_path / "cache", filter.filter_chunk
    whole = built(tmp_path / "whole", paths, cache=FilterCache(folder, ["a", "b"]))
    (folder / "b.arrow").unlink()

    def filter_chunk(chunk, policy, identity):
        (folder / "a.arrow").unlink()  # as a run over other shards does at its end
        return real(chunk, policy, identity)

    monkeypatch.setattr(filter, "filter_chunk", filter_chunk)
    assert built(tmp_path / "again", paths, cache=FilterCache(folder, ["a", "b"])) == whole


def test_temporary_files_of_a_killed_run_are_deleted_after_a_day(tmp_path):
    (tmp_path / "cache").mkdir()
    old, fresh = tmp_path / "cache" / "x.1.tmp", tmp_path / "cache" / "y.2.tmp"
    for path, age in ((old, 90_000), (fresh, 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache = FilterCache(tmp_path / "cache", ["a"])
    built(tmp_path / "out", write_shards(tmp_path / "in", logs(0, 9)), cache=cache)
    assert fresh.exists() and not old.exists()


def test_the_cache_holds_no_text(tmp_path):
    paths = write_shards(tmp_path / "in", logs(0, 100))
    built(tmp_path / "out", paths, cache=FilterCache(tmp_path / "cache", ["a"]))
    (cached,) = (tmp_path / "cache").iterdir()
    assert b"request" not in cached.read_bytes() and b"ann@" not in cached.read_bytes()


def test_processes_give_the_same_dataset(tmp_path, monkeypatch):
    strict = Policy(CurationSettings(), POLICY.benchmark, answer_validator({"not": {"const": 7}}))
    paths = write_shards(tmp_path / "in", logs(0, 300), logs(300, 500))
    one = built(tmp_path / "one", paths, strict)
    monkeypatch.setattr(filter, "_SINGLE_PROCESS_ROWS", 0)
    monkeypatch.setattr(filter, "_CHUNK_ROWS", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert built(tmp_path / "two", paths, strict) == one


@needs_ray
@pytest.mark.slow
def test_two_ray_workers_give_the_same_dataset(two_ray_nodes, tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "in", logs(0, 300), logs(300, 500))
    one = built(tmp_path / "one", paths)
    monkeypatch.setattr(filter, "_CHUNK_ROWS", 100)
    on_ray = replace(POLICY, settings=CurationSettings(compute="ray"))
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    assert built(tmp_path / "ray", paths, on_ray) == one
    assert (root.level, root.handlers) == before  # the process still shows its warnings


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    on_ray = replace(POLICY, settings=CurationSettings(compute="ray"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install .*'\.\[ray\]', or set compute: local"):
        built(tmp_path / "out", write_shards(tmp_path / "in", logs(0, 9)), on_ray)
