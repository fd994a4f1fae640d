"""A git repository of Modelfiles: one commit and one tag for each version, so that it can be looked up and built.

Commits are made in a temporary index and become visible by one update of the branch, so a kill leaves the repository
as it was before, and a lock that a killed git left does not stop them. The repository belongs to this project: a folder
with anything else is refused. The user's configuration of git is not changed, and no hook runs.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_pipeline.deployment.ollama import check_parameters, model_parameters
from finetune_pipeline.deployment.target import Observed, Release, TargetError, TargetRefused
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.records import Message
from finetune_pipeline.settings import ModelfilesSettings, UpstreamSettings
from finetune_pipeline.wording import first_line

_MARKER = ".finetune-modelfiles"
_MARKER_TEXT = "finetune writes this repository: one commit and one tag for each model version. Do not commit to it.\n"
_ATTRIBUTES = "*.gguf filter=lfs diff=lfs merge=lfs -text\n"
_BRANCH = "refs/heads/main"
_VERSION = re.compile(r"v\d+\.\d+\.\d+")
_IDENTITY = ("-c", "user.name=finetune", "-c", "user.email=finetune@localhost")
_QUIET = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false", "-c", "tag.gpgSign=false", "-c", "gc.auto=0")
_SECONDS = 600
_ATTEMPTS = 5


class Modelfiles:
    """The repository as something that follows the champion; see `deployment.target.Target`."""

    wants_merged_folder = False

    def __init__(self, settings: ModelfilesSettings, loop: str) -> None:
        self.name = settings.key
        self._settings = settings

    def check_config(self, release: Release) -> None:
        """Raise TargetRefused for a setting that Ollama does not have."""
        check_parameters(release.config)

    def observe(self, release: Release) -> Observed:
        """Return the release if it is recorded; the base model, which has no version, need not be."""
        if not _VERSION.fullmatch(release.label):
            return Observed(release.label, detail="only versions are recorded")
        tag = _tag(self._settings, release)
        if not _exists(Path(self._settings.path)):
            return Observed(None, detail=f"{self._settings.path} does not exist yet")
        commit = _Repository(Path(self._settings.path)).recorded(tag, release)
        return Observed(release.label, commit, tag) if commit else Observed(None, detail=f"no tag {tag} yet")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Return None: a version is recorded at once, by `activate`."""
        return None

    def activate(self, release: Release) -> None:
        """Record the version."""
        if _VERSION.fullmatch(release.label):
            record_version(self._settings, release)

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Return nothing: a repository keeps all versions."""
        return []

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return None: a repository answers no requests."""
        return None

    def start_command(self, release: Release) -> str | None:
        """Return None: there is no server."""
        return None


def record_version(settings: ModelfilesSettings, release: Release) -> str:
    """Commit and tag the Modelfile of a version, and return the tag; idempotent.

    Raises:
        TargetError: git or Git LFS is missing or fails; nothing is half recorded.
        TargetRefused: the folder or the tag belongs to something else.
    """
    tag = _tag(settings, release)
    repository = _Repository(Path(settings.path))
    repository.create()
    for _ in range(_ATTEMPTS):
        if repository.recorded(tag, release) or repository.record(tag, release, weights=settings.weights):
            repository.update_files()
            return tag
    raise TargetError(f"{settings.path} was changed by somebody else {_ATTEMPTS} times meanwhile; it is tried again")


def modelfile(release: Release, weights: str) -> str:
    """Return the Modelfile of a release, for `ollama create`.

    Args:
        weights: path of the GGUF, relative to the Modelfile or absolute.

    Raises:
        TargetRefused: Ollama cannot have the release, or the system prompt cannot be written into a Modelfile.
    """
    if release.adapter_gguf is not None:
        raise TargetRefused(
            f"{release.name} is a base with an adapter, which Ollama refuses since 0.34.1, so it has no Modelfile; set "
            "export.form: merged and train again, or remove deploy.modelfiles"
        )
    lines = [f"# {release.name}, GGUF with SHA-256 {release.gguf_sha256}", f"FROM {weights}"]
    if release.system_prompt:
        if '"""' in release.system_prompt:
            raise TargetRefused('the system prompt has """, which would end it in a Modelfile; change system_prompt')
        lines.append(f'SYSTEM """{release.system_prompt}"""')
    for name, value in model_parameters(release, load_tokenizer(release.base_folder)).items():
        for one in value if isinstance(value, list) else [value]:
            text = str(one).lower() if isinstance(one, bool) else str(one)
            lines.append(f'PARAMETER {name} "{text}"' if isinstance(one, str) else f"PARAMETER {name} {text}")
    return "\n".join(lines) + "\n"


class _Repository:
    """A repository, addressed so that no surrounding one and no variable of git's can take its place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the repository with its first commit, if that is missing.

        Raises:
            TargetRefused: there is something else.
        """
        files = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if _exists(self.path) and self._commit_of(_BRANCH):
            if self._run("cat-file", "-e", f"{_BRANCH}:{_MARKER}", check=False).returncode:
                raise TargetRefused(
                    f"{self.path} is a git repository, but not one that finetune made ({_MARKER} is missing); set "
                    "deploy.modelfiles.path to another folder"
                )
            return
        if files - {".git"} or (_exists(self.path) and self._out("for-each-ref")):
            raise TargetRefused(
                f"{self.path} is not empty, and not a repository that finetune made; set deploy.modelfiles.path to a "
                "new folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._run("init", "--quiet", "--template=", f"--initial-branch={_BRANCH.rpartition('/')[2]}")
        first = {_MARKER: self._blob(_MARKER_TEXT), ".gitattributes": self._blob(_ATTRIBUTES)}
        self._commit(first, "Begin a repository of Modelfiles\n", None, {})

    def recorded(self, tag: str, release: Release) -> str | None:
        """Return the commit of a version's tag; None if there is no such tag.

        Raises:
            TargetRefused: the tag is of something else.
        """
        commit = self._commit_of(f"refs/tags/{tag}")
        if commit and not {*_trailers(release)} <= {*self._out("log", "-1", "--format=%B", commit).split("\n")}:
            raise TargetRefused(
                f"the tag {tag} in {self.path} is not of {release.name} with SHA-256 {release.sha256[:16]}; delete or "
                "rename it, or set another deploy.modelfiles.tag"
            )
        return commit

    def record(self, tag: str, release: Release, *, weights: bool) -> bool:
        """Commit and tag a version; return False if another process changed the branch meanwhile."""
        parent = self._commit_of(_BRANCH)
        pattern = f"^{re.escape(_trailers(release)[0])}$"
        commit: str | None = self._out("log", "-1", "--format=%H", "-E", f"--grep={pattern}", _BRANCH)
        moment = _promoted(release).isoformat()
        dates = {"GIT_AUTHOR_DATE": moment, "GIT_COMMITTER_DATE": moment}
        if not commit:  # else a kill came before the tag
            model = f"{release.loop}/model.gguf"
            text = modelfile(release, "./model.gguf" if weights else str(release.gguf))
            files = {f"{release.loop}/Modelfile": self._blob(text)}
            files |= {model: self._blob_of_weights(release)} if weights else {}
            message = "\n".join([f"Add {release.name}", "", *_trailers(release), ""])
            commit = self._commit(files, message, parent, dates)
        if not commit:
            return False
        self._run("tag", "--annotate", "--force", f"--message={release.name}", tag, commit, extra=dates)
        return True

    def update_files(self) -> None:
        """Bring the working tree to the branch; a file that somebody changed there stays as it is.

        Raises:
            TargetError: a lock or a changed file is in the way. The version is recorded all the same.
        """
        lock = self.path / ".git" / "index.lock"
        if self._out("symbolic-ref", "--quiet", "HEAD", check=False) != _BRANCH:
            return  # somebody looks at another branch or version
        done = self._run("reset", "--quiet", "--merge", "HEAD", check=False)
        if done.returncode:
            reason = (
                f"{lock} exists. If no git runs there, a killed one left it: delete it"
                if lock.exists()
                else f"{first_line(done.stderr)} Undo the changes there with `git checkout -f`"
            )
            raise TargetError(f"the version is recorded, but the files of {self.path} could not be updated: {reason}")

    def _blob_of_weights(self, release: Release) -> str:
        """Store the GGUF by Git LFS and return the blob that points to it."""
        if shutil.which("git-lfs") is None:
            raise TargetError(
                "deploy.modelfiles.weights needs Git LFS, and git-lfs is not installed; install it (such as apt-get "
                "install git-lfs), or set weights: false. The version is not recorded yet"
            )
        self._run("lfs", "install", "--local", "--skip-repo")  # for whoever uses the repository; changes its own config
        with release.gguf.open("rb") as file:
            pointer = self._run("lfs", "clean", "--", "model.gguf", stdin=file).stdout
        if f"oid sha256:{release.gguf_sha256}\n" not in pointer:
            raise TargetRefused(
                f"{release.gguf} is damaged or was replaced: Git LFS stored {pointer!r}, expected SHA-256 "
                f"{release.gguf_sha256}; restore it, or train again"
            )
        return self._blob(pointer)

    def _commit(
        self, files: Mapping[str, str], message: str, parent: str | None, dates: Mapping[str, str]
    ) -> str | None:
        """Commit blobs by their paths on top of `parent`; return None if the branch is not at `parent` any more."""
        with tempfile.TemporaryDirectory(prefix="finetune-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            if parent:
                self._run("read-tree", parent, extra=index)
            entries = "".join(f"100644 {blob}\t{path}\n" for path, blob in files.items())
            self._run("update-index", "--add", "--index-info", text=entries, extra=index)
            tree = self._out("write-tree", extra=index)
        parents = ["-p", parent] if parent else []
        commit = self._out("commit-tree", tree, *parents, text=message, extra=dates)
        moved = self._run("update-ref", _BRANCH, commit, parent or "0" * 40, check=False)
        if moved.returncode and self._commit_of(_BRANCH) == parent:
            raise self._failed(moved)
        return None if moved.returncode else commit

    def _blob(self, text: str) -> str:
        return self._out("hash-object", "-w", "--stdin", text=text)

    def _commit_of(self, name: str) -> str | None:
        return self._out("rev-parse", "--quiet", "--verify", f"{name}^{{commit}}", check=False) or None

    def _out(self, *arguments: str, **options: Any) -> str:
        return self._run(*arguments, **options).stdout.strip()

    def _run(
        self,
        *arguments: str,
        text: str | None = None,
        stdin: Any = None,
        extra: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        """Run git; `stdin` is a file, or `text` is its input."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        place = (f"--git-dir={self.path / '.git'}", f"--work-tree={self.path}")
        try:
            done = subprocess.run(
                ["git", *_IDENTITY, *_QUIET, *place, *arguments],
                cwd=self.path,
                env={**environment, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(extra or {})},
                **({"stdin": stdin} if stdin is not None else {"input": text or ""}),
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=_SECONDS,
            )
        except FileNotFoundError as error:
            raise TargetError(
                "git is not installed, which deploy.modelfiles needs; install it, or remove deploy.modelfiles"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"git {arguments[0]} did not end within {_SECONDS} s in {self.path}") from error
        if check and done.returncode:
            raise self._failed(done)
        return done

    def _failed(self, done: "subprocess.CompletedProcess[str]") -> TargetError:
        said = done.stderr.strip() or f"status {done.returncode}"
        return TargetError(f"git failed in {self.path}: {said}; correct that, it is tried again")


def _exists(path: Path) -> bool:
    return (path / ".git" / "HEAD").is_file()


def _tag(settings: ModelfilesSettings, release: Release) -> str:
    """Return the tag of a release.

    Raises:
        TargetRefused: the pattern makes no valid name of a tag.
    """
    tag = settings.tag_of(release.loop, release.label, _promoted(release))
    invalid = re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/-]|[/.]$|\.lock$", tag)
    if invalid:
        raise TargetRefused(
            f"deploy.modelfiles.tag makes the tag {tag!r}, and git does not allow {invalid[0]!r} there; change it"
        )
    return tag


def _promoted(release: Release) -> datetime:
    if release.promoted_at is None:
        raise TargetRefused(f"{release.name} was never promoted, so it is not recorded")
    return release.promoted_at


def _trailers(release: Release) -> tuple[str, str]:
    return f"Model: {release.name}", f"Model-SHA256: {release.sha256}"
