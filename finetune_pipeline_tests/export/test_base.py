"""Resolving and hashing base models."""

import pytest

from finetune_pipeline import artifacts
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.settings import PROJECT_ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "state"))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (model / name).write_text(name)
    return model


def test_a_folder_may_be_absolute_or_relative_to_the_project(folder):
    assert resolve_base_model(str(folder)) == folder
    assert resolve_base_model("finetune_pipeline/export") == PROJECT_ROOT / "finetune_pipeline" / "export"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "data/nothing"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ExportError, match=r"base_model: the folder .*nothing.* does not exist"):
        resolve_base_model(name)


def test_the_offline_error_names_folder_cache_and_network(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"'some-one/some-model' is neither a folder .* nor in the cache .*network"):
        resolve_base_model("some-one/some-model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_the_hash_changes_with_each_file_of_the_model(folder, name):
    before = base_hash(folder)
    (folder / name).write_text("something else")
    assert base_hash(folder) != before


def test_the_hash_ignores_other_files(folder):
    before = base_hash(folder)
    (folder / "README.md").write_text("about")
    (folder / "replay.jsonl").write_text("{}")
    assert base_hash(folder) == before


def test_an_unchanged_file_is_not_hashed_again(folder, monkeypatch):
    before = base_hash(folder)
    monkeypatch.setattr(artifacts, "hash_file", lambda path: pytest.fail(f"{path} was read again"))
    assert base_hash(folder) == before


def test_a_damaged_cache_is_ignored(folder, tmp_path):
    before = base_hash(folder)
    (tmp_path / "state" / "cache" / "file_hashes.json").write_text("{")
    assert base_hash(folder) == before


def test_a_folder_without_weights_is_not_a_base_model(tmp_path):
    with pytest.raises(ExportError, match="no safetensors weights"):
        base_hash(tmp_path)
