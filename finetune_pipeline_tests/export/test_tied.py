"""An adapter on tied embeddings would be merged into the output layer too, so it is rejected."""

import json

import pytest

from finetune_pipeline.export import merge
from finetune_pipeline.export.gguf import convert
from finetune_pipeline.export.merge import merge_here
from finetune_pipeline.export.parity import compare_answers
from finetune_pipeline.export.reference import ReferencePrompts
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.records import chat_messages

from ..training.conftest import STARTER


def base_of(random_base, folder, tied):
    """Return the random base with tied or separate embeddings and output layer."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(random_base, folder)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def adapter_of(base, folder, **given):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        folder, save_embedding_layers=False
    )
    return folder


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([[1, 7, 30, 500, 5]])).logits


def both(base, adapter, merged):
    """Return the logits of the base with its adapter, and of the merged model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return logits(with_adapter), logits(AutoModelForCausalLM.from_pretrained(merged))


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_equals_the_unmerged_one_or_is_rejected(random_base, tmp_path, tied, names):
    base = base_of(random_base, tmp_path / "base", tied)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=names)
    if tied:
        with pytest.raises(SystemExit, match="tie_word_embeddings"):
            merge_here(base, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge_here(base, adapter, tmp_path / "merged")
    expected, found = both(base, adapter, tmp_path / "merged")
    assert (expected - found).abs().max() < 1e-3


@pytest.mark.parametrize("given", [
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 30]},
])  # fmt: skip
def test_other_adapters_of_a_tied_model_are_merged(random_base, tmp_path, given):
    base = base_of(random_base, tmp_path / "base", tied=True)
    adapter = adapter_of(base, tmp_path / "adapter", **given)
    merge_here(base, adapter, tmp_path / "merged")
    expected, found = both(base, adapter, tmp_path / "merged")
    assert (expected - found).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "alpha", "least", "most"), [(["q_proj", "v_proj"], 4, 0.8, 1), (["lm_head"], 16, 0, 0.3)]
)
def test_low_agreement_reveals_such_a_merge(tmp_path, monkeypatch, names, alpha, least, most):
    monkeypatch.setattr(merge, "_refuse_tied", lambda _: None)  # without the check
    adapter = adapter_of(STARTER, tmp_path / "adapter", target_modules=names, lora_alpha=alpha)
    chats = [
        chat_messages("", f"{thickness} mm {what} wall")
        for thickness in (100, 150, 200)
        for what in ("CMU", "brick", "")
    ]
    ReferencePrompts(chats, 40).write(tmp_path / "prompts.json")
    merge_here(STARTER, adapter, tmp_path / "merged", tmp_path / "prompts.json", tmp_path / "answers.json")
    convert(tmp_path / "merged", tmp_path / "merged.gguf", "f16", STARTER)
    with Engine(ModelSpec(gguf=tmp_path / "merged.gguf", context=256)) as engine:
        served = engine.generate([GenerateRequest(messages=messages, max_tokens=40) for messages in chats])
    reference = json.loads((tmp_path / "answers.json").read_text())
    assert len({*reference}) > 2
    assert least <= compare_answers(reference, [one.text for one in served]).fraction <= most
