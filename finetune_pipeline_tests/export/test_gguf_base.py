"""A base model that is a GGUF: read once into a folder for training, or rejected with what is wrong."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finetune_pipeline.export.base import base_stamp, local_tokenizer, resolve_base_model
from finetune_pipeline.export.base_check import check_vocabulary
from finetune_pipeline.export.gguf_base import dequantize_here, is_gguf, make_byte_level
from finetune_pipeline.export.model import export
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.pipeline.demo_loop import smollm2_gguf
from finetune_pipeline.settings import SettingsError, home
from finetune_pipeline.training.base_model import check_base_model

from ..training.conftest import STARTER


@pytest.fixture(scope="session")
def starter_gguf(tmp_path_factory):
    """Return the starter model as a Q8_0 GGUF, beside other files."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "config.json").write_text("{}")  # of another model: not to be read
    return export(STARTER, None, folder, "Q8_0", lambda step: None).gguf


def copy(source, target, *, left_out=(), changed=(), architecture=None):
    """Copy a GGUF with other metadata: `changed` has values of strings by key."""
    reader = gguf.GGUFReader(source)
    architecture = architecture or reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    changed = dict(changed)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", *left_out, *changed):
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, text in changed.items():
        writer.add_string(key, text)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def problem_of(path, folder):
    folder.mkdir()
    dequantize_here(path, folder)
    return (folder / "problem.txt").read_text()


def test_a_gguf_becomes_the_folder_that_it_was_made_from(starter_gguf):
    assert is_gguf(starter_gguf) and local_tokenizer(str(starter_gguf)) is None
    folder = resolve_base_model(str(starter_gguf))
    check_base_model(folder)  # what training checks
    assert folder.parent == home() / "cache" / "gguf_bases" and local_tokenizer(str(starter_gguf)) == folder
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]  # no draft is left
    before, after = (AutoTokenizer.from_pretrained(path) for path in (STARTER, folder))
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    chat = [{"role": "user", "content": "How thick is wall 12?"}]
    assert after.apply_chat_template(chat, add_generation_prompt=True) == before.apply_chat_template(
        chat, add_generation_prompt=True
    )
    weights = AutoModelForCausalLM.from_pretrained(STARTER, dtype="float32").state_dict()
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
    assert weights.keys() == read.keys()
    for name, tensor in weights.items():
        largest = float(tensor.abs().max())
        assert np.allclose(read[name], tensor, atol=largest / 100), name  # Q8_0 has 8 bits
    changed = folder / "config.json"
    stamp = changed.stat().st_mtime_ns
    assert resolve_base_model(str(starter_gguf)) == folder and changed.stat().st_mtime_ns == stamp  # made once


def test_an_ollama_blob_has_no_ending(starter_gguf, tmp_path):
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(starter_gguf.read_bytes())
    assert is_gguf(blob)
    assert base_stamp(str(blob))["size"] == blob.stat().st_size
    other = base_stamp(str(copy(starter_gguf, tmp_path / "other", changed={"general.name": "another"})))
    assert other["metadata"] != base_stamp(str(blob))["metadata"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "mamba3"}, "its architecture is 'mamba3', and transformers reads llama,"),
        ({"left_out": ["tokenizer.ggml.model"]}, "it has no tokenizer"),
        ({"left_out": ["tokenizer.chat_template"]}, "it has no chat template"),
        ({"changed": {"tokenizer.chat_template": "{{ raise_exception('no') }}"}}, "rejects every conversation"),
        ({"changed": {"tokenizer.chat_template": "{% for %}"}}, "its chat template cannot be used"),
        ({"changed": {"llama.rope.scaling.type": "yarn"}}, "it scales its position embeddings (yarn)"),
        ({"changed": {"tokenizer.ggml.model": "unheard-of"}}, "tokenizer"),
    ],
)
def test_a_gguf_that_cannot_be_used_is_rejected(starter_gguf, tmp_path, changes, said):
    assert said in problem_of(copy(starter_gguf, tmp_path / "changed.gguf", **changes), tmp_path / "out")


@pytest.mark.parametrize("part", [0.001, 0.5, 0.99])
def test_a_gguf_cut_short_is_rejected(starter_gguf, tmp_path, part):
    content = starter_gguf.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(content[: int(len(content) * part)])
    assert "cut short" in problem_of(short, tmp_path / "out")


def test_an_unusable_gguf_leaves_nothing_in_the_cache(starter_gguf, tmp_path):
    path = copy(starter_gguf, tmp_path / "no-template.gguf", left_out=["tokenizer.chat_template"])
    with pytest.raises(ExportError, match=r"no-template\.gguf cannot be used: it has no chat template"):
        resolve_base_model(str(path))
    folders = [one for one in (home() / "cache" / "gguf_bases").iterdir() if one.is_dir()]
    assert not [one.name for one in folders if "no-template" in one.name]


def test_a_file_that_is_no_gguf_is_rejected(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text(json.dumps({}))
    with pytest.raises(ExportError, match="is not a GGUF; name a GGUF, a folder or a Hugging Face id"):
        resolve_base_model(str(path))
    with pytest.raises(ExportError, match=r"base_model: the file .*gone\.gguf does not exist"):
        resolve_base_model("models/gone.gguf")


def test_a_byte_level_tokenizer_is_not_taken_for_one_of_sentencepiece(tmp_path):
    """transformers reads the tokenizer of every llama GGUF with SentencePiece's byte fallback."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", *sorted(alphabet), "1Ġ", "12"])}
    model = models.BPE(vocabulary, [("1", "2")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    make_byte_level(tokenizer, "smollm")
    text = "für 12 Türen…"
    pieces = tokenizer.tokenize(text)
    assert "12" not in pieces and tokenizer.decode(tokenizer(text).input_ids) == text
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert not saved["model"]["byte_fallback"]  # from which llama.cpp's converter concludes that it is SentencePiece's


@pytest.mark.slow
def test_smollm2_is_read_so_that_its_vocabulary_can_be_converted():
    try:
        given = smollm2_gguf()
    except SettingsError as error:
        pytest.skip(str(error))
    assert check_vocabulary(resolve_base_model(str(given)), "Answer in JSON.", ["12 walls, 3.5 m; für Türen"]) == []
