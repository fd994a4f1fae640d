"""A LoRA adapter beside its base model answers as the adapted model does in transformers."""

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline_tests.inference.conftest import run_converter


def test_base_and_adapter_answer_as_the_adapted_model_does(stories_folder, stories_gguf, stories, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:  # strong enough to change the story, too weak to leave only noise
            torch.nn.init.normal_(weights, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.generate(input_ids=torch.tensor([[1]]), max_new_tokens=30, do_sample=False, eos_token_id=2)[
        0, 1:
    ]
    run_converter(
        "convert_lora_to_gguf.py", tmp_path / "adapter", "--base", stories_folder, "--outfile", tmp_path / "a.gguf"
    )

    request = GenerateRequest(prompt="", max_tokens=30)
    with Engine(ModelSpec(gguf=stories_gguf, adapter=tmp_path / "a.gguf", context=128, parallel=2)) as engine:
        [found] = engine.generate([request])
    assert found.token_ids == expected.tolist()
    assert found.token_ids != stories.generate([request])[0].token_ids
