"""Snapshots of several files: in processes, on Ray, and with what was found before; always the same dataset."""

import os
import time

import pyarrow.parquet as pq
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.curation import chosen, sifted, snapshot
from finetune_pipeline.curation.acceptance import Policy, answer_validator
from finetune_pipeline.curation.dataset import curate, curate_files, write_dataset
from finetune_pipeline.curation.dataset_files import PROVENANCE_FILE
from finetune_pipeline.curation.sifted import Cache
from finetune_pipeline.curation.snapshot import table_of
from finetune_pipeline.pipeline.loop_files import identity
from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.settings import CurationSettings

from ..conftest import needs_ray
from .test_dataset import EVERYTHING, POLICY, example, said
from .test_preferences import corrected, disliked


def logs(start, end):
    """A little of everything."""
    for n in range(start, end):
        yield example(n, prompt=f"request {n // 2} for a wall of the kind {n // 2 * 7919 % 1009}", target=f"{n // 4}")
    yield corrected(10_000 + start, prompt=f"mail ann@example.com about {start}", history=said("hello", "hi"))
    yield disliked(20_000 + start)
    yield example(30_000 + start, prompt="The golden question of ALL!")


def write(path, *parts, rows=100):
    paths = []
    for number, examples in enumerate(parts):
        paths.append(path / f"part-{number}.parquet")
        pq.write_table(table_of(examples), paths[-1], row_group_size=rows)
    return paths


def hashes(curated, folder):
    """Every file that is written, by its hash."""
    write_dataset(curated, folder, "Answer.")
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_give_what_their_examples_give(tmp_path):
    parts = [list(logs(0, 300)), list(logs(300, 400))]
    whole = curate([*parts[0], *parts[1]], [], POLICY, identity)
    files = curate_files(write(tmp_path, *parts), [], POLICY, identity)
    assert files == whole and len(files.train) > 100
    written = hashes(files, tmp_path / "a")
    assert written == hashes(whole, tmp_path / "b")
    assert sorted(name for name in written if name.startswith("prompt_completion/")) == [
        "prompt_completion/dataset_dict.json",
        *(f"prompt_completion/{split}/{name}" for split in ("train", "validation") for name in
          ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")),
    ]  # fmt: skip
    assert not list((tmp_path / "a").glob(".*")), "nothing is left of the writing"


def test_long_rows_are_read_in_parts_that_memory_holds_and_give_the_same(tmp_path, monkeypatch):
    parts = [list(logs(0, 300)), [example(400, history=said("ü" * 3_000, "hi")), *logs(300, 400)]]
    paths = write(tmp_path, *parts)
    whole = curate_files(paths, [], POLICY, identity)
    written = hashes(whole, tmp_path / "a")
    taken = []

    def take(rows, places, columns, real=snapshot.Rows.take):
        table = real(rows, places, columns)
        texts = [row["prompt"] + "".join(turn["content"] for turn in row["history"] or ()) for row in table.to_pylist()]
        taken.append((len(texts), sum(len(text.encode()) for text in texts)))
        return table

    monkeypatch.setattr(chosen, "_BYTES", 3_000)
    read = curate_files(paths, [], POLICY, identity)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot.Rows, "take", take)
        assert {**hashes(read, tmp_path / "b"), PROVENANCE_FILE: ""} == {
            **written,
            PROVENANCE_FILE: "",
        }  # its lines come in parts
    one, other = (sorted((tmp_path / name / PROVENANCE_FILE).read_text().splitlines()) for name in ("a", "b"))
    assert one == other
    assert all(size <= 3_000 or rows == 1 for rows, size in taken)
    assert max(rows for rows, _ in taken) > 10 and len(taken) > 5


def test_a_later_file_s_row_of_an_interaction_stands(tmp_path):
    early = [example(1, target="early"), example(2), example(3)]
    late = [example(1, target="late"), example(2, reward=-0.5)]
    retracted = table_of([example(3)]).to_pylist()[0] | dict.fromkeys(["target", "reward", "confirmed", "corrected"])
    paths = write(tmp_path, early, late, [])
    pq.write_table(table_of([example(9)]).from_pylist([retracted], table_of([]).schema), paths[2])
    curated = curate_files(paths, [], EVERYTHING, identity)
    assert [(row.prompt, row.completion) for row in curated.train] == [("prompt number 1", "late")]
    assert curated.left_out == {"reward below 0.3": 1}


def test_a_new_cycle_looks_at_new_files_only_and_a_full_one_gives_the_same(tmp_path, monkeypatch):
    paths = write(tmp_path, logs(0, 200), logs(200, 260), logs(260, 300))
    folder, looked = tmp_path / "cache", []
    real = sifted.sift_chunk

    def seen(chunk, policy, identity):
        looked.append(chunk.part.rows.name)
        return real(chunk, policy, identity)

    monkeypatch.setattr(sifted, "sift_chunk", seen)
    curate_files(paths[:2], [], POLICY, identity, Cache(folder, ["a", "b"]))
    assert looked == ["part-0.parquet", "part-1.parquet"]
    third = curate_files(paths, [], POLICY, identity, Cache(folder, ["a", "b", "c"]))
    assert looked[2:] == ["part-2.parquet"]
    assert hashes(third, tmp_path / "third") == hashes(curate_files(paths, [], POLICY, identity), tmp_path / "full")
    curate_files(paths[2:], [], POLICY, identity, Cache(folder, ["c"]))
    assert [path.name for path in folder.iterdir()] == ["c.arrow"], "what no part needs any more is gone"


def test_identical_files_each_have_their_own_rows(tmp_path):
    first, second = list(logs(0, 60)), list(logs(60, 90))
    paths = write(tmp_path, first, second, first, logs(90, 120), second)
    assert hash_file(paths[0]) == hash_file(paths[2])
    cache = Cache(tmp_path / "cache", ["a", "b", "a", "c", "b"])
    cold = hashes(curate_files(paths, [], POLICY, identity, cache), tmp_path / "cold")
    assert cold == hashes(curate_files(paths, [], POLICY, identity, cache), tmp_path / "warm")
    assert cold == hashes(curate_files(paths, [], POLICY, identity), tmp_path / "none")


def test_another_run_may_clear_the_kept_files_at_any_moment(tmp_path, monkeypatch):
    paths = write(tmp_path, logs(0, 60), logs(60, 90))
    folder, real = tmp_path / "cache", sifted.sift_chunk
    whole = curate_files(paths, [], POLICY, identity, Cache(folder, ["a", "b"]))
    (folder / "b.arrow").unlink()

    def cleared(chunk, policy, identity):
        (folder / "a.arrow").unlink()  # what a run over other parts does at its end
        return real(chunk, policy, identity)

    monkeypatch.setattr(sifted, "sift_chunk", cleared)
    again = curate_files(paths, [], POLICY, identity, Cache(folder, ["a", "b"]))
    assert hashes(again, tmp_path / "again") == hashes(whole, tmp_path / "whole")


def test_what_a_killed_run_left_half_written_goes_after_a_day(tmp_path):
    (tmp_path / "cache").mkdir()
    old, fresh = tmp_path / "cache" / "x.1.tmp", tmp_path / "cache" / "y.2.tmp"
    for path, age in ((old, 90_000), (fresh, 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    curate_files(write(tmp_path, logs(0, 9)), [], POLICY, identity, Cache(tmp_path / "cache", ["a"]))
    assert fresh.exists() and not old.exists()


def test_nobody_s_words_are_kept_between_cycles(tmp_path):
    paths = write(tmp_path, logs(0, 100))
    curate_files(paths, [], POLICY, identity, Cache(tmp_path / "cache", ["a"]))
    (kept,) = (tmp_path / "cache").iterdir()
    assert b"request" not in kept.read_bytes() and b"ann@" not in kept.read_bytes()


def test_processes_find_the_same(tmp_path, monkeypatch):
    strict = Policy(CurationSettings(), POLICY.benchmark, answer_validator({"not": {"const": 7}}))
    paths = write(tmp_path, logs(0, 300), logs(300, 500))
    alone = hashes(curate_files(paths, [], strict, identity), tmp_path / "alone")
    monkeypatch.setattr(sifted, "_ALONE", 0)
    monkeypatch.setattr(sifted, "_CHUNK", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert hashes(curate_files(paths, [], strict, identity), tmp_path / "two") == alone


@needs_ray
@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_find_the_same(two_ray_nodes, tmp_path, monkeypatch):
    paths = write(tmp_path, logs(0, 300), logs(300, 500))
    alone = hashes(curate_files(paths, [], POLICY, identity), tmp_path / "alone")
    monkeypatch.setattr(sifted, "_CHUNK", 100)
    policy = Policy(CurationSettings(compute="ray"), POLICY.benchmark, answer_validator(None))
    assert hashes(curate_files(paths, [], policy, identity), tmp_path / "ray") == alone


def test_without_ray_it_says_how_to_get_it(tmp_path, monkeypatch):
    policy = Policy(CurationSettings(compute="ray"), POLICY.benchmark, answer_validator(None))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install .*'\.\[ray\]', or set compute: local"):
        curate_files(write(tmp_path, logs(0, 9)), [], policy, identity)
