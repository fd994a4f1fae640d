"""A folder in the layout of a repository on the Hugging Face Hub, one folder for each release.

    v1.2.0/
        README.md                   the model card, with the Hub's metadata
        adapter_config.json, adapter_model.safetensors
        notes-v1.2.0.gguf           the model (or notes-v1.2.0-lora.gguf and base.gguf)
        tokenizer files of the base model
        merged/                     merged weights, on request
        manifest.json               SHA-256 of each file; written last
    current -> v1.2.0               the active release

A release is written under a temporary name and renamed, so a folder with its own name is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from finetune_pipeline.artifacts import flush, hash_file, hash_file_cached, write_text
from finetune_pipeline.deployment.files import PART, writing
from finetune_pipeline.deployment.target import BASE, Observed, Release, TargetError, TargetRefused
from finetune_pipeline.manifests import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES
from finetune_pipeline.records import Message
from finetune_pipeline.settings import FolderTarget, UpstreamSettings

CURRENT = "current"
MANIFEST = "manifest.json"
MERGED = "merged"
README = "README.md"

_LABEL = re.compile(rf"v\d+\.\d+\.\d+|{BASE}|[0-9a-f]{{16}}")


class Folder:
    """A folder as a deployment target; see `deployment.target.Target`."""

    def __init__(self, settings: FolderTarget, loop: str) -> None:
        self.name = settings.key
        self.wants_merged_folder = settings.merged
        self._path = Path(settings.path)
        self._loop = loop

    def check_config(self, release: Release) -> None:
        """Accept everything: the folder records it, and whoever serves from it applies it."""

    def observe(self, release: Release) -> Observed:
        """Return the release that `current` names; the files of the wanted one are checked by hash."""
        current = self._path / CURRENT
        try:
            label = str(current.readlink()) if current.is_symlink() else current.read_text(encoding="utf-8").strip()
        except OSError:
            return Observed(None, detail=f"{self._path} has no {CURRENT}")
        manifest = self._manifest(label) if _LABEL.fullmatch(label) else None
        if manifest is None:
            return Observed(None, detail=f"{current} names {label[:60]}, which is no release")
        if manifest["loop"] != self._loop:
            return Observed(None, detail=f"{current} names a release of the loop {manifest['loop']}")
        if label == release.label and (problem := self._difference(release, manifest)):
            return Observed(None, detail=f"{self._path / label}: {problem}")
        return Observed(label, str(manifest["sha256"]), f"{current} names {label}")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Write the release's folder, unless it is there with this content."""
        folder = self._path / release.label
        manifest = self._manifest(release.label)
        if manifest is not None and manifest["loop"] != self._loop:
            raise TargetRefused(
                f"{folder} is a release of the loop {manifest['loop']}; give each loop a path of its own "
                "(deploy.targets)"
            )
        if manifest is None and folder.exists():
            raise TargetError(f"{folder} exists and was not written by a deployment; move it away")
        if manifest is not None and self._difference(release, manifest) is None:
            return None
        draft = self._path / f".{release.label}.{os.getpid()}{PART}"
        with writing(self._path):
            try:
                shutil.rmtree(draft, ignore_errors=True)
                write_release(release, draft)
                old = self._path / f".{release.label}.old{PART}"
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    folder.rename(old)
                draft.rename(folder)
                flush(self._path)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return None

    def activate(self, release: Release) -> None:
        """Let `current` name the release: a link, or a file with the label on a disk without links."""
        current, temporary = self._path / CURRENT, self._path / f".{CURRENT}.{os.getpid()}{PART}"
        if current.is_dir() and not current.is_symlink():
            raise TargetError(f"{current} is a folder, and has to be a link to the active release; move it away")
        with writing(self._path):
            try:
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(release.label, target_is_directory=True)
            except OSError:
                write_text(current, release.label + "\n")
                return
            temporary.replace(current)
            flush(self._path)

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Remove folders of the loop's other releases, and what killed processes left."""
        removed = []
        for label, manifest in [*self._releases()]:
            if manifest["loop"] == self._loop and label not in keep:
                old = self._path / f".{label}.old{PART}"
                shutil.rmtree(old, ignore_errors=True)
                (self._path / label).rename(old)  # a kill leaves no incomplete release
                removed.append(label)
        for path in self._path.glob(f".*{PART}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return removed

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return None: a folder answers nothing."""
        return None

    def start_command(self, release: Release) -> str | None:
        """Return None: a folder is not started."""
        return None

    def _releases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self._path.glob(f"*/{MANIFEST}")):
            label = path.parent.name
            if _LABEL.fullmatch(label) and not path.parent.is_symlink() and (manifest := self._manifest(label)):
                yield label, manifest

    def _manifest(self, label: str) -> dict[str, Any] | None:
        """Return the manifest of a release's folder; None if there is none that a deployment wrote."""
        with suppress(OSError, ValueError):
            manifest = json.loads((self._path / label / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and {"loop", "sha256", "files"} <= manifest.keys():
                return manifest
        return None

    def _difference(self, release: Release, manifest: dict[str, Any]) -> str | None:
        """Return how a folder differs from what would be written for a release; None if it does not."""
        for name, expected in _identity(release).items():
            if manifest.get(name) != expected:
                return f"its {name} is {manifest.get(name)!r}, expected {expected!r}"
        for name, file in manifest["files"].items():
            path = self._path / release.label / name
            if not path.is_file():
                return f"{name} is missing"
            if hash_file_cached(path) != file["sha256"]:
                return f"{name} is damaged or was replaced"
        return None


def write_release(release: Release, folder: Path) -> None:
    """Write a release into a new folder in the layout of the Hub; its manifest is written last.

    Raises:
        TargetRefused: a file of the model is not the evaluated one.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder.mkdir(parents=True)
    gguf = f"{release.loop}-{release.label}.gguf" if release.adapter_gguf is None else "base.gguf"
    _copy(release.gguf, folder / gguf, release.gguf_sha256)
    if release.adapter_gguf is not None:
        _copy(release.adapter_gguf, folder / f"{release.loop}-{release.label}-lora.gguf")
    for name in TOKENIZER_FILES:
        if (release.base_folder / name).is_file():
            _copy(release.base_folder / name, folder / name)
    if release.adapter_folder is not None:
        _copy(release.adapter_folder / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        config = json.loads((release.adapter_folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # Training wrote a path of this machine.
        config["base_model_name_or_path"] = release.base_name
        write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    if release.merged_folder is not None:
        for path in sorted(release.merged_folder.iterdir()):
            if path.is_file():
                _copy(path, folder / MERGED / path.name)
    write_text(folder / README, readme(release))
    files = {
        str(path.relative_to(folder)): {"sha256": hash_file(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {**_identity(release), "created_at": created_at, "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def readme(release: Release) -> str:
    """Return the model card of a release with the metadata that the Hub reads: base model, library, tags."""
    text = release.model_card
    metadata: dict[str, Any] = {}
    if match := re.match(r"---\n(.*?)\n---\n*", text, re.DOTALL):
        metadata, text = yaml.safe_load(match[1]) or {}, text[match.end() :]
    metadata.pop("base_model", None)
    if "/" in release.base_name:  # the Hub accepts ids only
        metadata["base_model"] = release.base_name
        if release.adapter_folder is not None:
            metadata["base_model_relation"] = "adapter"
    kinds = ["gguf"] if release.adapter_folder is None else ["lora", "gguf"]
    metadata |= {
        "library_name": "llama.cpp" if release.adapter_folder is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*metadata.get("tags", ()), *kinds, release.loop])),
    }
    text = text or f"# {release.name}\n\nThe base model {release.base_name}, as the loop {release.loop} serves it.\n"
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _identity(release: Release) -> dict[str, Any]:
    return {
        "loop": release.loop,
        "label": release.label,
        "sha256": release.sha256,
        "base_model": release.base_name,
        "merged": release.merged_folder is not None,
        "deployment_config": dict(release.config),
    }


def _copy(source: Path, path: Path, sha256: str | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, path)
    flush(path)
    if sha256 is not None and (found := hash_file(path)) != sha256:
        raise TargetRefused(
            f"{source} is damaged or was replaced: its SHA-256 is {found[:16]}..., expected {sha256[:16]}... of the "
            "evaluated file; nothing was deployed. Restore it, or train again"
        )
