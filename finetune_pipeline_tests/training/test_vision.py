"""Models with a vision tower: only the language model gets an adapter."""

import pytest
import torch

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.model import lora_config

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny Gemma 3 with a vision tower."""
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299, boi_token_index=297,
        eoi_token_index=298,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma") / "tiny"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", LAYERS), (("q_proj", "v_proj"), {"q_proj", "v_proj"})])
def test_only_the_language_models_layers_get_an_adapter(base, targets, layers):
    from peft import get_peft_model

    model = load(base)
    adapted = get_peft_model(model, lora_config(TrainingSettings(lora_target_modules=targets), model))
    trained = [name for name, values in adapted.named_parameters() if values.requires_grad]
    assert len(trained) == 2 * 2 * len(layers)  # A and B, in two layers
    assert all(".language_model.layers." in name for name in trained)
    assert {name.rsplit(".", 4)[1] for name in trained} == layers


def test_the_adapter_is_merged_and_converted_under_the_names_of_the_base(base, tmp_path):
    import gguf
    from peft import PeftModel, get_peft_model

    from finetune_pipeline.export.gguf import convert_adapter
    from finetune_pipeline.export.merge import merge_here

    model = load(base)
    adapted = get_peft_model(model, lora_config(TrainingSettings(), model))
    for values in adapted.parameters():
        if values.requires_grad:
            torch.nn.init.normal_(values, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted)
    assert not torch.allclose(expected, logits_of(load(base)), atol=1e-2)
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)  # as for a warm start
    assert torch.equal(logits_of(again), expected)
    assert not any("vision" in name for name, values in again.named_parameters() if values.requires_grad)
    merge_here(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert torch.allclose(logits_of(merged), expected, atol=1e-4)
    assert set(merged.state_dict()) == set(load(base).state_dict())
    convert_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf")
    tensors = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert len(tensors) == 2 * 2 * len(LAYERS) and all(name.startswith("blk.") for name in tensors)
