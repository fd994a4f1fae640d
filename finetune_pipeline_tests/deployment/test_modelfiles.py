"""The repository of Modelfiles: real git, kills between its commands, and everything that may be in the way."""

import os
import shutil
import signal
import subprocess
import threading
from datetime import UTC, datetime

import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment.modelfiles import Modelfiles, record_version
from finetune_pipeline.deployment.target import Release, TargetError, TargetRefused
from finetune_pipeline.settings import ModelfilesSettings
from finetune_pipeline_tests.deployment.conftest import STARTER

MOMENT = datetime(2026, 2, 17, 12, 30, tzinfo=UTC)
TAG = "finetuned-v2026-02-17-v1.0.0"


@pytest.fixture(autouse=True)
def own_git(tmp_path, monkeypatch):
    """Give git a home without a configuration."""
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "modelfiles"


@pytest.fixture
def settings(path):
    return ModelfilesSettings(path=str(path))


@pytest.fixture
def version(tmp_path):
    """Return a function that makes the release of a version, whose GGUF nobody reads."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(10_000))
    given = {"gguf": gguf, "gguf_sha256": hash_file(gguf), "base_folder": STARTER, "base_name": "starter_model"}
    given |= {"loop": "notes", "system_prompt": "Parse the request.", "context": 512, "max_tokens": 64}

    def make(label="v1.0.0", **changes):
        return Release(**{**given, "label": label, "promoted_at": MOMENT, "sha256": f"{label:0<64}", **changes})

    return make


def git(path, *arguments):
    return subprocess.run(["git", *arguments], cwd=path, check=True, capture_output=True, text=True).stdout.strip()


def test_each_version_has_one_commit_and_one_tag(settings, path, version, tmp_path):
    assert record_version(settings, version()) == TAG
    assert record_version(settings, version("v1.1.0")) == "finetuned-v2026-02-17-v1.1.0"
    assert git(path, "log", "--format=%s", "main").split("\n") == [
        "Add notes@v1.1.0", "Add notes@v1.0.0", "Begin a repository of Modelfiles",
    ]  # fmt: skip
    assert git(path, "tag").split("\n") == [TAG, "finetuned-v2026-02-17-v1.1.0"]
    assert git(path, "log", "-1", "--format=%an %ad", "--date=iso-strict", TAG) == "finetune 2026-02-17T12:30:00+00:00"
    assert git(path, "status", "--porcelain") == ""
    release = version()
    assert git(path, "show", f"{TAG}:notes/Modelfile").split("\n") == [
        f"# notes@v1.0.0, GGUF with SHA-256 {release.gguf_sha256}",
        f"FROM {release.gguf}",
        'SYSTEM """Parse the request."""',
        "PARAMETER num_ctx 512",
        "PARAMETER num_predict 64",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|im_end|>"',
    ]
    assert "notes@v1.1.0" in (path / "notes" / "Modelfile").read_text()
    assert (path / ".gitattributes").read_text() == "*.gguf filter=lfs diff=lfs merge=lfs -text\n"
    head = git(path, "rev-parse", "main")
    record_version(settings, version())
    record_version(settings, version("v1.1.0"))
    assert git(path, "rev-parse", "main") == head
    assert list((tmp_path / "user").iterdir()) == []


def test_loops_share_a_repository(path, version):
    settings = ModelfilesSettings(path=str(path), tag="{loop}/{version}")
    record_version(settings, version())
    assert record_version(settings, version(loop="other")) == "other/1.0.0"
    assert sorted(one.name for one in path.iterdir()) == [
        ".finetune-modelfiles", ".git", ".gitattributes", "notes", "other",
    ]  # fmt: skip


def test_it_follows_the_champion_like_a_target(settings, path, version):
    target = Modelfiles(settings, "notes")
    release = version()
    assert target.observe(release).label is None
    assert target.stage(release) is None
    target.activate(release)
    observed = target.observe(release)
    assert (observed.label, observed.digest) == ("v1.0.0", git(path, "rev-parse", f"{TAG}^{{commit}}"))
    assert target.observe(version("v1.1.0")).label is None
    assert target.observe(version("base", promoted_at=None)).label == "base"  # has no version, so nothing is recorded
    target.activate(version("base", promoted_at=None))
    assert target.remove_old(set()) == []
    assert len(git(path, "tag").split("\n")) == 1


def test_neither_hooks_nor_the_users_variables_take_part(settings, path, version, tmp_path, monkeypatch):
    record_version(settings, version())
    (path / ".git" / "hooks").mkdir(exist_ok=True)
    for name in ("pre-commit", "reference-transaction", "post-checkout", "post-index-change"):
        hook = path / ".git" / "hooks" / name
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran-{name}\n")
        hook.chmod(0o755)
    git(tmp_path, "init", "--quiet", "surrounding")
    for name, value in {"GIT_DIR": "surrounding/.git", "GIT_INDEX_FILE": "x", "GIT_WORK_TREE": "y"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    record_version(settings, version("v1.1.0"))
    inside = ModelfilesSettings(path=str(tmp_path / "surrounding" / "modelfiles"))
    record_version(inside, version())
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    assert list(tmp_path.glob("ran-*")) == []
    assert len(git(path, "tag").split("\n")) == 2
    assert git(tmp_path / "surrounding", "for-each-ref") == ""
    assert git(tmp_path / "surrounding" / "modelfiles", "tag") == TAG


def test_what_is_not_ours_is_refused_and_stays(settings, path, version):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(TargetRefused, match="is not empty, and not a repository that finetune made"):
        record_version(settings, version())
    git(path, "init", "--quiet", "--initial-branch=main")
    git(path, "add", "thesis.txt")
    git(path, "-c", "user.name=me", "-c", "user.email=me@x", "commit", "--quiet", "-m", "thesis")
    head = git(path, "rev-parse", "HEAD")
    with pytest.raises(TargetRefused, match=r"not one that finetune made \(.finetune-modelfiles is missing\)"):
        record_version(settings, version())
    assert (git(path, "rev-parse", "HEAD"), git(path, "tag"), len(list(path.iterdir()))) == (head, "", 2)


def test_a_tag_of_something_else_is_refused(settings, path, version):
    record_version(settings, version())
    git(path, "tag", "finetuned-v2026-02-17-v1.1.0", "main")
    with pytest.raises(TargetRefused, match=r"v1\.1\.0 in .* is not of notes@v1\.1\.0"):
        record_version(settings, version("v1.1.0"))
    with pytest.raises(TargetRefused, match=r"is not of notes@v1\.0\.0 with SHA-256 ffff"):
        record_version(settings, version(sha256="f" * 64))  # another registry's v1.0.0


def test_a_lock_that_a_killed_git_left_does_not_stop_the_commit(settings, path, version):
    record_version(settings, version())
    (path / ".git" / "index.lock").touch()
    with pytest.raises(TargetError, match=r"is recorded, but .*index\.lock exists\. If no git runs there.*delete it"):
        record_version(settings, version("v1.1.0"))
    assert len(git(path, "tag").split("\n")) == 2
    assert "v1.0.0" in (path / "notes" / "Modelfile").read_text()
    (path / ".git" / "index.lock").unlink()
    record_version(settings, version("v1.1.0"))
    assert "v1.1.0" in (path / "notes" / "Modelfile").read_text()


def test_changed_files_of_the_working_tree_stay(settings, path, version):
    record_version(settings, version())
    (path / "notes" / "Modelfile").write_text("mine")
    with pytest.raises(TargetError, match=r"is recorded, but the files .* `git checkout -f`"):
        record_version(settings, version("v1.1.0"))
    assert (path / "notes" / "Modelfile").read_text() == "mine"
    git(path, "checkout", "--quiet", "-f")
    git(path, "checkout", "--quiet", TAG)
    record_version(settings, version("v1.2.0"))
    assert "v1.0.0" in (path / "notes" / "Modelfile").read_text()  # somebody looks at it
    assert len(git(path, "tag").split("\n")) == 3


KILLING_GIT = """#!/bin/sh
count=$(($(cat {folder}/count) + 1))
echo $count > {folder}/count
if [ $count -eq {last} ]; then kill -9 $PPID; exit 1; fi
exec {git} "$@"
"""


def test_a_kill_before_any_command_of_git_is_recovered_from(settings, path, version, tmp_path, monkeypatch):
    def record_and_be_killed(last: int) -> bool:
        """Record in a process that is killed before the last-th command of git; return whether it was."""
        folder = tmp_path / f"killing-{last}"
        folder.mkdir()
        (folder / "count").write_text("0")
        (folder / "git").write_text(KILLING_GIT.format(folder=folder, last=last, git=shutil.which("git")))
        (folder / "git").chmod(0o755)
        child = os.fork()
        if child == 0:
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
            record_version(settings, version())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    record_version(ModelfilesSettings(path=str(tmp_path / "first")), version())  # reads the tokenizer
    kills = 0
    while record_and_be_killed(kills + 1):
        kills += 1
        again = tmp_path / f"again-{kills}"
        if path.exists():
            shutil.copytree(path, again)
        record_version(ModelfilesSettings(path=str(again)), version())
        assert git(again, "tag") == TAG
        assert git(again, "rev-list", "--count", "main") == "2"
        assert git(again, "status", "--porcelain") == ""
        assert "v1.0.0" in (again / "notes" / "Modelfile").read_text()
        shutil.rmtree(path, ignore_errors=True)
    assert kills > 10
    assert git(path, "tag") == TAG


def test_versions_that_are_recorded_at_once_are_both_there(settings, path, version):
    record_version(settings, version())
    failed = []

    def record(label: str) -> None:
        try:
            record_version(settings, version(label))
        except TargetError as error:  # the files, since both update them
            failed.append(str(error))

    threads = [threading.Thread(target=record, args=(f"v2.{number}.0",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is recorded, but the files" in text for text in failed)
    assert len(git(path, "tag").split("\n")) == 5
    assert git(path, "rev-list", "--count", "main") == "6"


def test_weights_need_git_lfs_and_nothing_is_recorded_without(path, version, tmp_path, monkeypatch):
    settings = ModelfilesSettings(path=str(path), weights=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(TargetError, match=r"git-lfs is not installed; install it .* or set weights: false"):
        record_version(settings, version())
    assert git(path, "tag") == "" and git(path, "show", "main:.gitattributes").startswith("*.gguf filter=lfs")
    assert record_version(ModelfilesSettings(path=str(path)), version()) == TAG


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed: apt-get install git-lfs")
def test_weights_are_kept_by_git_lfs(path, version, tmp_path):
    settings, release = ModelfilesSettings(path=str(path), weights=True), version()
    record_version(settings, release)
    assert "FROM ./model.gguf\n" in (path / "notes" / "Modelfile").read_text()
    assert git(path, "show", f"{TAG}:notes/model.gguf").split("\n")[1] == f"oid sha256:{release.gguf_sha256}"
    assert (path / "notes" / "model.gguf").read_bytes() == release.gguf.read_bytes()
    assert git(path, "status", "--porcelain") == ""
    assert list((tmp_path / "user").iterdir()) == []
    content = bytearray(release.gguf.read_bytes())
    content[-1] ^= 1
    (tmp_path / "tampered.gguf").write_bytes(content)
    with pytest.raises(TargetRefused, match="is damaged or was replaced"):
        record_version(settings, version("v1.1.0", gguf=tmp_path / "tampered.gguf"))
    assert git(path, "tag") == TAG


def test_git_is_needed(settings, version, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="git is not installed"):
        record_version(settings, version())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_gguf": "adapter.gguf"}, "has no Modelfile; set export.form: merged"),
        ({"system_prompt": 'Say """'}, 'the system prompt has """'),
        ({"config": {"max_model_len": 1}}, "has no parameter max_model_len"),
        ({"promoted_at": None}, "was never promoted"),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings, path, version, changes, message):
    with pytest.raises(TargetRefused, match=message):
        record_version(settings, version(**changes))
    assert not path.exists() or git(path, "tag") == ""


@pytest.mark.parametrize("tag", ["a b{version}", "{version}..", "/{version}", "v{version}.lock", "{version}~"])
def test_a_pattern_that_git_does_not_allow_is_refused(path, version, tag):
    with pytest.raises(TargetRefused, match=r"deploy\.modelfiles\.tag makes the tag"):
        record_version(ModelfilesSettings(path=str(path), tag=tag), version())


@pytest.mark.parametrize(
    ("tag", "message"),
    [("finetuned", "has no {version}"), ("{version}-{day}", "has {day}; expected {date}, {version}")],
)
def test_a_pattern_with_wrong_placeholders_is_an_error_of_the_settings(tag, message):
    with pytest.raises(ValueError, match=message):
        ModelfilesSettings(path="x", tag=tag)


@pytest.mark.parametrize(
    "pattern", ["finetuned-v{date}-v{version}", "{loop}/{version}", "v{version}", "a.{version}+{date}"]
)
def test_a_tag_names_its_version(pattern):
    settings = ModelfilesSettings(path="x", tag=pattern)
    tag = settings.tag_of("notes", "v1.10.0", MOMENT.date())
    assert settings.version_of("notes", tag) == "v1.10.0"
    assert settings.version_of("notes", f"{tag}x") is None
    assert settings.version_of("notes", "v1.10.0") == ("v1.10.0" if pattern == "v{version}" else None)
    assert settings.version_of("other", tag) == (None if "{loop}" in pattern else "v1.10.0")
