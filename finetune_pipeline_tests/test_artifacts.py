import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_pipeline import artifacts
from finetune_pipeline.artifacts import (
    ArtifactBusyError,
    ArtifactError,
    draft,
    find,
    get_latest,
    hash_file,
    hash_file_cached,
    new_file,
    publish,
    stage_folder,
)
from finetune_pipeline.manifests import BaseGgufManifest

FIELDS = {
    "loop": "notes", "version": "v1", "inputs": {"base": "abc"}, "settings": {}, "packages": {},
    "gguf": "model.gguf", "quantization": "F16", "base_hash": "abc",
}  # fmt: skip


def make(content="weights"):
    with draft("notes", "base_gguf", "v1") as folder:
        (folder / "model.gguf").write_text(content)
        return publish(folder, BaseGgufManifest, FIELDS)


def test_a_published_artifact_is_found_with_its_manifest():
    made = make()
    found = find(BaseGgufManifest, "notes", "v1")
    assert found == made
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "model.gguf"]
    assert found.manifest.files["model.gguf"].size == 7


def test_a_folder_without_a_manifest_is_not_an_artifact():
    (make().path / "manifest.json").unlink()
    assert find(BaseGgufManifest, "notes", "v1") is None
    assert make("again").manifest.files["model.gguf"].size == 5


@pytest.mark.parametrize("damage", ["shorter", None])
def test_a_damaged_file_is_reported_with_the_remedy(damage):
    file = make().path / "model.gguf"
    if damage:
        file.write_text("x")
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match=r"model\.gguf: expected 7 bytes.*materialize base_gguf again"):
        find(BaseGgufManifest, "notes", "v1")


def test_an_error_leaves_no_draft():
    with pytest.raises(RuntimeError), draft("notes", "base_gguf", "v1") as folder:
        (folder / "model.gguf").write_text("half")
        raise RuntimeError("failed")
    assert find(BaseGgufManifest, "notes", "v1") is None
    assert not list(stage_folder("notes", "base_gguf").glob(".draft-v1"))


HOLD = """
import signal
from finetune_pipeline.artifacts import draft
with draft("notes", "base_gguf", "v1") as folder:
    (folder / "half").write_text("half")
    print("holding", flush=True)
    signal.pause()
"""


def test_a_draft_is_locked_until_its_process_ends():
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ArtifactBusyError, match="another process is working on base_gguf v1 of notes"):
            make()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    made = make()
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "model.gguf"]


def test_a_full_disk_is_reported_and_earlier_artifacts_stay(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs root: {mount.stderr.strip()}")
    monkeypatch.setenv("FINETUNE_HOME", str(disk))
    try:
        kept = make()
        error = pytest.raises(ArtifactError, match=r"the disk is full.*Free some space or set FINETUNE_HOME")
        with error, draft("notes", "base_gguf", "v2") as folder:
            (folder / "model.gguf").write_bytes(b"x" * 5_000_000)
        assert find(BaseGgufManifest, "notes", "v1") == kept
        assert [path.name for path in stage_folder("notes", "base_gguf").iterdir() if path.is_dir()] == ["v1"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_has_its_own_latest_version():
    manifest = make().manifest
    artifacts.set_latest(manifest, "run-1")
    assert get_latest(BaseGgufManifest, "notes", "run-1").manifest == manifest
    assert get_latest(BaseGgufManifest, "notes").manifest == manifest
    assert get_latest(BaseGgufManifest, "notes", "run-2") is None


WRITER = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from finetune_pipeline.artifacts import write_text
path = Path(sys.argv[1])
while True:
    for letter in "ab":
        write_text(path, letter * 200_000)
        print("written", flush=True)
"""


@pytest.mark.parametrize("writes", [1, 4, 9, 16])
def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path, writes):
    path = tmp_path / "file"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(writes):
        assert writer.stdout.readline() == "written\n"
    writer.kill()  # it is within the next write
    writer.wait()
    assert path.read_text() in {"a" * 200_000, "b" * 200_000}


def test_a_hash_does_not_depend_on_key_order():
    assert artifacts.hash_of({"a": 1, "b": [2]}) == artifacts.hash_of(json.loads('{"b": [2], "a": 1}'))
    assert artifacts.hash_of({"a": 1}) != artifacts.hash_of({"a": 2})


WAIT = """
from finetune_pipeline.artifacts import wait_for_lock
from finetune_pipeline.settings import home
with wait_for_lock(home() / "training", "training", lambda text: print(text, flush=True)):
    print("locked", flush=True)
"""


def test_a_waiting_process_gets_the_lock_of_a_killed_one():
    hold = WAIT + "    import signal; signal.pause()\n"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert holder.stdout.readline() == "locked\n"
    waiting = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert waiting.stdout.readline() == "another training is running on this machine; waiting for it to finish\n"
    holder.kill()
    holder.wait()
    assert waiting.communicate(timeout=30)[0] == "locked\n"


def test_a_file_is_hashed_again_only_after_a_change(tmp_path, own_home, monkeypatch):
    file, read = tmp_path / "model.gguf", []

    def counted(path):
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(artifacts, "hash_file", counted)
    file.write_text("one")
    first = hash_file_cached(file)
    assert (first, hash_file_cached(file), len(read)) == (hash_file(file), first, 1)
    stat = file.stat()
    file.write_text("longer")
    assert hash_file_cached(file) == hash_file(file) and len(read) == 2
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert hash_file_cached(file) == hash_file(file) and len(read) == 3
    other = tmp_path / "other"
    other.write_text("six")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    other.replace(file)  # the same size and mtime, but another inode
    assert hash_file_cached(file) == hash_file(file) and len(read) == 4
    file.write_text("ten")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size, inode and mtime, but another ctime
    assert hash_file_cached(file) == hash_file(file) and len(read) == 5
    assert hash_file_cached(file, force=True) == hash_file(file) and len(read) == 6
    (own_home / "cache" / "file_hashes.json").write_text("{")
    assert hash_file_cached(file) == hash_file(file)


def test_threads_that_write_one_file_at_once_do_not_take_each_others_temporary_file(tmp_path):
    path, meet = tmp_path / "same.txt", threading.Barrier(2)

    def write(text):
        for _ in range(50):
            with new_file(path, force=True) as file:
                meet.wait()  # both temporary files are open
                file.write(text)

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(write, text) for text in ("a", "b")]:
            done.result()
    assert path.read_text() in ("a", "b") and [one.name for one in tmp_path.iterdir()] == ["same.txt"]
