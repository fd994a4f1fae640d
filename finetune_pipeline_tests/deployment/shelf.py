"""A target of the tests: a folder of GGUF files with the name of the active one, and faults on request.

A file `fail-STEP` in the folder makes the step fail with its text; `refuse-STEP` makes it a refusal. While `pause-STEP`
exists the step waits in its middle, and says so by `paused-STEP`. So another process can control it.
"""

import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from finetune_pipeline.artifacts import hash_file, write_text
from finetune_pipeline.deployment.target import Observed, Release, TargetError, TargetRefused
from finetune_pipeline.records import Message
from finetune_pipeline.settings import FolderTarget, UpstreamSettings


class Shelf:
    """A folder of GGUF files, one for each release; the file `current` holds the label of the active one."""

    wants_merged_folder = False

    def __init__(self, settings: FolderTarget, loop: str) -> None:
        self.name = settings.key
        self.folder = Path(settings.path)
        self.folder.mkdir(parents=True, exist_ok=True)

    def observe(self, release: Release) -> Observed:
        self._at("observe")
        label = self._read("current")
        if label is None:
            return Observed(None, detail="an empty shelf")
        return Observed(label, hash_file(self.folder / f"{label}.gguf"))

    def stage(self, release: Release) -> UpstreamSettings | None:
        path, temporary = self.folder / f"{release.label}.gguf", self.folder / f".{os.getpid()}.part"
        if path.exists() and hash_file(path) == release.gguf_sha256:
            return None
        content = release.gguf.read_bytes()
        temporary.write_bytes(content[: len(content) // 2])
        self._at("stage")
        temporary.write_bytes(content)
        temporary.replace(path)
        self._count("uploads")
        return None

    def activate(self, release: Release) -> None:
        self._at("activate")
        if not (self.folder / "ignore-activate").exists():
            write_text(self.folder / "current", release.label)
        self._at("activated")

    def remove_old(self, keep: Collection[str]) -> list[str]:
        self._at("remove_old")
        old = sorted(path for path in self.folder.glob("v*.gguf") if path.stem not in keep)
        for path in old:
            path.unlink()
        return [path.stem for path in old]

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        return None

    def start_command(self, release: Release) -> str | None:
        return None

    @property
    def uploads(self) -> int:
        """Number of files that were copied."""
        return len(self._read("uploads") or "")

    def _at(self, step: str) -> None:
        self._count(f"calls-{step}")
        if self._read(f"refuse-{step}"):
            raise TargetRefused(str(self._read(f"refuse-{step}")))
        if self._read(f"fail-{step}"):
            raise TargetError(str(self._read(f"fail-{step}")))
        if (self.folder / f"crash-{step}").exists():
            raise AssertionError("a bug of the target")
        while (self.folder / f"pause-{step}").exists():
            (self.folder / f"paused-{step}").touch()
            time.sleep(0.01)

    def _count(self, name: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write("x")

    def _read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return None


RECONCILE = """
import sys
from pathlib import Path
from finetune_pipeline.deployment import target_state
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.settings import read_loop
from finetune_pipeline_tests.deployment.shelf import Shelf
deploy.open_target = Shelf
target_state.LEASE_SECONDS = float(sys.argv[2])
for state in deploy.reconcile(read_loop(Path(sys.argv[1])), print, force=True):
    print(state.state, state.observed, state.last_error)
"""
"""A script that reconciles the loop of a YAML file with shelves, as another process."""

MODEL_COMMAND = """
import sys
from pathlib import Path
from finetune_pipeline.cli import model, options
from finetune_pipeline.deployment import target_state
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.settings import read_loop
from finetune_pipeline_tests.deployment.shelf import Shelf
deploy.open_target = Shelf
target_state.LEASE_SECONDS = float(sys.argv[2])
options.the_loop = lambda name: read_loop(Path(sys.argv[1]))
model.model(sys.argv[3:])
"""
"""A script that runs `finetune model` with the further arguments, on the loop of a YAML file with shelves."""


def shelf(**fields: Any) -> dict[str, Any]:
    """Return the settings of a shelf as in YAML."""
    return {"kind": "folder", **fields}
