"""Tokenizers read texts as llama.cpp does, which has no Unicode normalization."""

import json

import pytest
from tokenizers import normalizers

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline_tests.families import chat_template, served_tokens, transformers_tokenizer

NFC, SPACES = normalizers.NFC(), normalizers.Replace(" ", "_")


@pytest.mark.parametrize(
    ("normalizer", "left"),
    [
        (None, None),
        (NFC, None),
        (SPACES, ["Replace"]),
        (normalizers.Sequence([NFC, SPACES]), ["Replace"]),
        (normalizers.Sequence([normalizers.Sequence([normalizers.NFKC()])]), None),
    ],
)
def test_only_unicode_forms_are_removed(tmp_path, normalizer, left):
    made = transformers_tokenizer("qwen2", None)
    made.backend_tokenizer.normalizer = normalizer
    made.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path).backend_tokenizer.normalizer
    assert (found and [one["type"] for one in _flat(found)]) == left


def _flat(normalizer):
    state = json.loads(normalizer.__getstate__())
    return state.get("normalizers", [state])


def test_a_combining_accent_is_read_as_llama_cpp_reads_it(tmp_path):
    template = chat_template("qwen2_5")
    made = transformers_tokenizer("qwen2", template)
    made.backend_tokenizer.normalizer = NFC
    made.save_pretrained(tmp_path / "base")
    messages = [{"role": "user", "content": "cafe\u0301"}]
    [served] = served_tokens("qwen2", tmp_path, template, [messages])
    loaded = load_tokenizer(tmp_path / "base")
    ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == served["tokens"]
    assert ids != made.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
