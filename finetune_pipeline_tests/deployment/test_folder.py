"""A folder in the layout of the Hub: content, links, damage, kills, and a full disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune_pipeline.artifacts import hash_file, model_sha256
from finetune_pipeline.deployment import folder as folder_module
from finetune_pipeline.deployment.folder import CURRENT, MANIFEST, Folder, readme
from finetune_pipeline.deployment.target import Release, TargetError, TargetRefused
from finetune_pipeline.settings import FolderTarget
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.pipeline.test_full_disk import small_disk

from .conftest import STARTER

CARD = "---\nbase_model: snapshots/0123abcd\ntags: [gguf, notes]\nlicense: mit\n---\n\n# notes@v1.0.0\n\nParses.\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def make_release(tmp_path):
    """Return a function that makes a release of a file of 2 MB, which nobody loads."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(os.urandom(2_000_000))

    def make(label="v1.0.0", **changes):
        sha256 = hash_file(gguf)
        fields = {
            "loop": "notes", "label": label, "sha256": sha256, "gguf": gguf, "gguf_sha256": sha256,
            "base_folder": STARTER, "base_name": "starter_model",
        }  # fmt: skip
        return Release(**{**fields, **changes})

    return make


@pytest.fixture
def target(path):
    return Folder(FolderTarget(path=str(path)), "notes")


@pytest.fixture
def with_adapter(make_release, tmp_path):
    """Return a function that makes a release with an adapter of PEFT, whose base is on the Hub."""

    def make(label="v1.0.0", **changes):
        adapter = tmp_path / "adapter"
        if not adapter.exists():
            write_adapter(STARTER, adapter, 1)
            (adapter / "README.md").write_text("PEFT's card, with a path of this machine")
        fields = {"base_name": "owner/starter", "adapter_folder": adapter, "model_card": CARD, **changes}
        return make_release(label, **fields)

    return make


def brought(target, release):
    assert target.stage(release) is None
    target.activate(release)
    return target.observe(release)


def test_the_layout_is_that_of_a_hub_repository(target, path, with_adapter):
    release = with_adapter()
    assert target.observe(release).label is None
    observed = brought(target, release)
    assert (observed.label, observed.digest) == ("v1.0.0", release.sha256)
    folder = path / CURRENT
    assert str(folder.readlink()) == "v1.0.0"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "notes-v1.0.0.gguf", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    for name, file in manifest["files"].items():
        assert file == {"sha256": hash_file(folder / name), "size": (folder / name).stat().st_size}
    assert manifest["files"]["notes-v1.0.0.gguf"]["sha256"] == release.gguf_sha256
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/starter"
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["gguf", "notes", "lora"], "license": "mit", "base_model": "owner/starter",
        "base_model_relation": "adapter", "library_name": "peft", "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert text.strip() == "# notes@v1.0.0\n\nParses."


def test_peft_and_transformers_read_the_folder(target, path, with_adapter):
    from peft import PeftConfig
    from transformers import AutoTokenizer

    brought(target, with_adapter())
    assert PeftConfig.from_pretrained(path / CURRENT).base_model_name_or_path == "owner/starter"
    ours, base = (AutoTokenizer.from_pretrained(folder) for folder in (path / CURRENT, STARTER))
    chat = [{"role": "user", "content": "a wall, 20 cm"}]
    assert ours.apply_chat_template(chat) == base.apply_chat_template(chat)


def test_the_base_model_and_an_adapter_form_have_all_their_files(target, path, make_release, with_adapter, tmp_path):
    brought(target, make_release("base", merged_folder=STARTER))
    assert (path / "base" / "merged" / "model.safetensors").is_file() and (path / "base" / "notes-base.gguf").is_file()
    front = yaml.safe_load((path / "base" / "README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "llama.cpp" and "base_model" not in front  # a folder's name is no id of the Hub
    lora = tmp_path / "lora.gguf"
    lora.write_bytes(b"an adapter")
    plain = with_adapter("v1.0.0")
    brought(target, with_adapter(adapter_gguf=lora, sha256=model_sha256(plain.gguf_sha256, hash_file(lora))))
    assert {path.name for path in (path / CURRENT).glob("*.gguf")} == {"base.gguf", "notes-v1.0.0-lora.gguf"}


def test_a_release_is_written_once_and_again_if_it_was_changed(target, path, make_release):
    release = make_release()
    brought(target, release)
    gguf = path / "v1.0.0" / "notes-v1.0.0.gguf"
    before = gguf.stat().st_ino
    brought(target, release)
    assert gguf.stat().st_ino == before
    for change in (
        lambda: gguf.write_bytes(b"x" + gguf.read_bytes()[1:]),
        gguf.unlink,
        lambda: (path / "v1.0.0" / "tokenizer.model").write_bytes(b""),
    ):
        change()
        observed = target.observe(release)
        assert observed.label is None and ("damaged" in observed.detail or "missing" in observed.detail)
        assert brought(target, release).label == "v1.0.0"
    other = make_release(config={"temperature": 0.5})
    assert target.observe(other).label is None
    assert brought(target, other).label == "v1.0.0"
    assert json.loads((path / "v1.0.0" / MANIFEST).read_text())["deployment_config"] == {"temperature": 0.5}


def test_a_file_that_is_not_the_evaluated_one_is_refused(target, path, make_release):
    release = make_release(gguf_sha256="0" * 64)
    with pytest.raises(TargetRefused, match=r"is damaged or was replaced: its SHA-256 is .*nothing was deployed"):
        target.stage(release)
    assert [*path.iterdir()] == []


def test_old_releases_are_removed_and_those_of_others_stay(target, path, make_release):
    for label in ("v1.0.0", "v1.1.0", "v1.2.0"):
        brought(target, make_release(label))
    (path / "mine").mkdir()
    (path / "mine" / "file").touch()
    Folder(FolderTarget(path=str(path)), "other").stage(make_release("v0.9.0", loop="other"))
    (path / f".v9.9.9.123{folder_module.PART}").mkdir()  # a killed process left it
    assert target.remove_old(["v1.1.0", "v1.2.0"]) == ["v1.0.0"]
    assert sorted(one.name for one in path.iterdir()) == ["current", "mine", "v0.9.0", "v1.1.0", "v1.2.0"]
    assert target.remove_old(["v1.1.0", "v1.2.0"]) == []


def test_folders_of_others_are_not_overwritten(target, path, make_release):
    Folder(FolderTarget(path=str(path)), "other").stage(make_release("v1.0.0", loop="other"))
    with pytest.raises(TargetRefused, match="give each loop a path of its own"):
        target.stage(make_release())
    (path / "v1.1.0").mkdir()
    with pytest.raises(TargetError, match="was not written by a deployment; move it away"):
        target.stage(make_release("v1.1.0"))
    target.stage(make_release("v1.2.0"))
    (path / CURRENT).mkdir()
    with pytest.raises(TargetError, match="has to be a link"):
        target.activate(make_release("v1.2.0"))


@pytest.mark.parametrize("current", ["v7.0.0", "../../etc", "v1.0.0/../v1.0.0"])
def test_a_link_that_somebody_set_names_no_release(target, path, make_release, current):
    release = make_release()
    brought(target, release)
    (path / CURRENT).unlink()
    (path / CURRENT).symlink_to(current)
    assert target.observe(release).label is None
    target.activate(release)
    assert target.observe(release).label == "v1.0.0"


def test_without_links_a_file_names_the_release(target, path, make_release, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for label in ("v1.0.0", "v1.1.0"):
        assert brought(target, make_release(label)).label == label
        assert (path / CURRENT).read_text() == f"{label}\n"


def test_a_full_disk_leaves_what_was_there(make_release, own_home):
    with small_disk("models") as leave:
        target = Folder(FolderTarget(path=str(own_home / "models")), "notes")
        leave(2**19)
        release = make_release("v1.1.0")
        with pytest.raises(TargetError, match=r"the disk of .* is full .*nothing was changed there. Free some space"):
            target.stage(release)
        assert {one.name for one in (own_home / "models").iterdir()} == {"filler"}
        (own_home / "models" / "filler").unlink()
        assert brought(target, release).label == "v1.1.0"


KILLED = """
import os, sys
from pathlib import Path
from finetune_pipeline.deployment import folder
from finetune_pipeline.deployment.target import Release
from finetune_pipeline.settings import FolderTarget
path, gguf, sha256, base, step = sys.argv[1:]
release = Release(
    loop="notes", label="v1.0.0", sha256=sha256, gguf=Path(gguf), gguf_sha256=sha256, base_folder=Path(base),
    base_name="starter_model", system_prompt="Parse the request.", context=512, max_tokens=64,
)
target = folder.Folder(FolderTarget(path=path), "notes")
die = lambda *_, **__: os.kill(os.getpid(), 9)
if step == "write":
    folder.write_text = die
if step == "rename":
    Path.rename = die
target.stage(release)
if step == "link":
    Path.replace = die
if step != "activate":
    target.activate(release)
die()
"""


@pytest.mark.parametrize("step", ["write", "rename", "activate", "link"])
def test_a_kill_at_any_step_is_survived(target, path, make_release, step):
    release = make_release()
    arguments = [path, release.gguf, release.sha256, STARTER, step]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert killed.returncode == -9
    assert target.observe(release).label is None
    assert (path / "v1.0.0").exists() == (step in {"activate", "link"})
    assert brought(target, release).label == "v1.0.0"
    target.remove_old(["v1.0.0"])
    assert sorted(one.name for one in path.iterdir()) == ["current", "v1.0.0"]


def test_a_card_without_metadata_gets_some(make_release):
    text = readme(make_release(model_card="# Notes\n"))
    assert text.endswith("---\n\n# Notes\n") and yaml.safe_load(text.split("---\n")[1])["library_name"] == "llama.cpp"
