"""A full disk ends the snapshot and the dataset with one sentence, and leaves nothing incomplete."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from finetune_pipeline.artifacts import ArtifactError, stage_folder
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.settings import home
from finetune_pipeline_tests.orchestration.conftest import corrected


@contextmanager
def small_disk(name: str) -> Iterator[Callable[[int], None]]:
    """Mount a disk of 8 MB on a folder of the home; yield a function that leaves so many bytes free on it."""
    folder = home() / name
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs root: {mount.stderr.strip()}")

    def leave(size: int) -> None:
        fill = folder / "filler"
        fill.unlink(missing_ok=True)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        fill.write_bytes(b"x" * (free - size))

    try:
        yield leave
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def visible(loop, stage):
    """Return the names of a stage's folders."""
    return sorted(path.name for path in stage_folder(loop.name, stage).glob("*") if path.is_dir())


@pytest.mark.parametrize("free", [0, 4096, 12_288])
@pytest.mark.parametrize(("disk", "stage"), [("artifacts", "snapshot"), ("artifacts", "dataset"), ("cache", "dataset")])
def test_a_full_disk_is_a_sentence_and_the_next_run_succeeds(loop, disk, stage, free):
    with connect().write() as connection:
        record(connection, loop.name, corrected([f"word{number}" for number in range(300)]), default_reward)
    with small_disk(disk) as leave:
        if stage == "snapshot":
            leave(free)
            with pytest.raises(ArtifactError, match=r"the disk is full: .*Free some space or set FINETUNE_HOME"):
                snapshot(loop, connect())
            assert visible(loop, "raw_logs") == []
            leave(2**22)
            assert snapshot(loop, connect())[0].manifest.interactions == 300
            return
        logs, _ = snapshot(loop, connect())
        leave(free)
        with pytest.raises(ArtifactError, match=r"the disk is full: .*Free some space or set FINETUNE_HOME"):
            build_dataset(loop, logs)
        assert visible(loop, "curated_dataset") == []
        leave(2**22)
        assert build_dataset(loop, logs).manifest.train > 200
