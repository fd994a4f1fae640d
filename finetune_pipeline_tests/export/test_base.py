"""Resolving and hashing base models."""

import json
import shutil

import huggingface_hub
import pytest

from finetune_pipeline import artifacts
from finetune_pipeline.export.base import CONFIG_FILES, base_hash, check_base_name, resolve_base_model
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.settings import PROJECT_ROOT

from ..training.conftest import random_model


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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the Hub by a folder with a configuration; returns it and the patterns of each download."""
    downloads = []
    folder = tmp_path / "snapshot"
    folder.mkdir()

    def download(name, allow_patterns):
        downloads.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    return folder, downloads


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "bnb-4bit"),
        ("unsloth/gemma-2-2b-it-unsloth-bnb-4bit", "bnb-4bit"),
        ("some-one/Model-8B-Instruct-GPTQ-Int4", "GPTQ"),
        ("some-one/Model-8B-Instruct-AWQ", "AWQ"),
        ("some-one/model-4bit", "4bit"),
    ],
)
def test_a_quantized_model_is_rejected_by_its_name_before_anything_is_downloaded(hub, name, method):
    for check in (resolve_base_model, check_base_name):
        with pytest.raises(
            ExportError, match=rf"base_model: {name} has quantized .*\({method}\).*adapter: qlora to train"
        ):
            check(name)
    assert hub[1] == []


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-7B-Instruct", "google/gemma-3-4b-it-qat-q4_0-unquantized", "some-one/bnb-4bitter"]
)
def test_other_models_are_downloaded_after_their_configuration(hub, name):
    folder, downloads = hub
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert resolve_base_model(name, ("*.safetensors",)) == folder
    assert downloads == [[*CONFIG_FILES], ["*.safetensors"]]


def test_a_quantized_model_is_rejected_by_its_configuration_before_its_weights_are_downloaded(hub):
    folder, downloads = hub
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ExportError, match=r"the weights of some-one/model are quantized \(fp8, by .*config\.json\)"):
        resolve_base_model("some-one/model")
    assert downloads == [[*CONFIG_FILES]]


def test_a_folder_with_bitsandbytes_weights_is_rejected(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small = random_model(
        tmp_path / "small", "Llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(small, quantization_config=in_4_bits, device_map="cpu")
    shutil.copytree(small, tmp_path / "quantized")
    quantized.save_pretrained(tmp_path / "quantized")
    assert resolve_base_model(str(small)) == small
    for check in (resolve_base_model, check_base_name):
        with pytest.raises(ExportError, match=r"quantized are quantized \(4-bit bitsandbytes, by .*set base_model to"):
            check(str(tmp_path / "quantized"))


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
