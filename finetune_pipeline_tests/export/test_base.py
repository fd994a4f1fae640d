"""Where a base model is looked for, and what its hash is made of."""

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


def test_a_folder_is_taken_as_it_is_relative_to_the_project_too(folder):
    assert resolve_base_model(str(folder)) == folder
    assert resolve_base_model("finetune_pipeline/export") == PROJECT_ROOT / "finetune_pipeline" / "export"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "data/nothing"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ExportError, match=r"folder .*nothing.* of the base model .* does not exist"):
        resolve_base_model(name)


def test_offline_the_error_says_what_was_looked_for_and_where(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"'some-one/some-model' is neither a folder .* nor in the cache .*network"):
        resolve_base_model("some-one/some-model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_the_hash_changes_with_what_the_model_is(folder, name):
    before = base_hash(folder)
    (folder / name).write_text("something else")
    assert base_hash(folder) != before


def test_the_hash_does_not_change_with_what_lies_beside_it(folder):
    before = base_hash(folder)
    (folder / "README.md").write_text("about")
    (folder / "replay.jsonl").write_text("{}")
    assert base_hash(folder) == before


def test_a_file_that_has_not_changed_is_not_read_again(folder, monkeypatch):
    before = base_hash(folder)
    monkeypatch.setattr(artifacts, "hash_file", lambda path: pytest.fail(f"{path} was read again"))
    assert base_hash(folder) == before


def test_a_spoilt_cache_is_no_harm(folder, tmp_path):
    before = base_hash(folder)
    (tmp_path / "state" / "cache" / "file_hashes.json").write_text("{")
    assert base_hash(folder) == before


def test_a_folder_without_weights_is_no_base_model(tmp_path):
    with pytest.raises(ExportError, match="no safetensors weights"):
        base_hash(tmp_path)
