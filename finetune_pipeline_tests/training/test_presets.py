"""Architectures and presets: every preset on every known family."""

import json

import pytest

from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.architecture import FAMILIES, architecture_of, read_architecture
from finetune_pipeline.training.estimate import estimate_memory, layer_bytes
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.presets import PRESETS, apply_preset, fits, machine_of

PUBLISHED = {  # billions of parameters, from the models' cards
    "CodeLlama-7b": 6.74, "Llama-3.1-8B": 8.03, "Mistral-7B": 7.24, "deepseek-coder-6.7b": 6.74, "gemma-3-12b": 12.2,
    "Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "Qwen2.5-32B": 32.8, "Qwen3-0.6B": 0.6, "Qwen3-8B": 8.19,
    "Qwen3-32B": 32.8, "Llama-3.3-70B": 70.6,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_family_has_its_published_size(name):
    assert FAMILIES[name].parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.012)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text"])
def test_parameters_from_a_config_equal_those_of_the_model(kind, tmp_path):
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=640, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=kind != "Mistral",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    architecture = read_architecture(tmp_path / "config.json", kind)
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_mixture_of_experts_and_an_unknown_model_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 8, "hidden_size": 8}))
    with pytest.raises(TrainingError, match="mixture of experts"):
        architecture_of(str(tmp_path))
    with pytest.raises(TrainingError, match="nor one of the families known here"):
        architecture_of("somebody/some-model-1b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", r"holds \[\] instead of an object"),
        ('{"text_config": null}', "has no 'num_attention_heads'"),
        ('{"hidden_size": "64", "head_dim": 0}', "has hidden_size '64', head_dim 0 instead of positive integers"),
    ],
)
def test_a_broken_config_is_named_with_what_was_found(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(TrainingError, match=message) as error:
        architecture_of(str(tmp_path))
    assert str(path) in str(error.value)


def test_a_known_family_is_found_by_its_hugging_face_id():
    assert architecture_of("meta-llama/Llama-3.1-8B-Instruct").name == "Llama-3.1-8B"
    assert architecture_of("meta-llama/Meta-Llama-3.1-8B-Instruct").name == "Llama-3.1-8B"
    assert architecture_of("meta-llama/Llama-3-8B").name == "Meta-Llama-3-8B"
    assert architecture_of("Qwen/Qwen2.5-Coder-7B-Instruct") == architecture_of("Qwen/Qwen2.5-7B-Instruct")
    assert architecture_of("mistralai/Mistral-7B-Instruct-v0.3").vocabulary == 32768
    assert architecture_of("mistralai/Mistral-7B-v0.3").vocabulary == 32768
    assert architecture_of("mistralai/Mistral-7B-v0.1").vocabulary == 32000
    assert architecture_of("data/starter_model").parameters == pytest.approx(3.4e6, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_fits_or_is_refused(preset, name):
    machine = machine_of(preset)
    try:
        found = apply_preset(TrainingSettings(preset=preset), FAMILIES[name])
    except TrainingError as error:
        assert f"{name} does not fit preset {preset}: with qlora, per_device_train_batch_size 1" in str(error)
        return
    assert fits(FAMILIES[name], found, machine)
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 16


def test_presets_choose_lora_or_qlora_by_memory():
    small = apply_preset(TrainingSettings(preset="8gb"), FAMILIES["Mistral-7B"])
    assert (small.adapter, small.max_length) == ("qlora", 1024)
    assert apply_preset(TrainingSettings(preset="24gb"), FAMILIES["Mistral-7B"]).adapter == "lora"
    assert apply_preset(TrainingSettings(preset="80gb"), FAMILIES["Llama-3.3-70B"]).adapter == "qlora"
    with pytest.raises(TrainingError, match="the smallest preset for it is 80gb"):
        apply_preset(TrainingSettings(preset="24gb"), FAMILIES["Llama-3.3-70B"])


def test_a_preset_fills_only_what_is_not_set():
    own = TrainingSettings(preset="24gb", per_device_train_batch_size=2, lora_r=4, max_length=300)
    found = apply_preset(own, FAMILIES["Mistral-7B"])
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.lora_r, found.max_length) == (
        2,
        8,
        4,
        300,
    )
    plain = TrainingSettings(per_device_train_batch_size=3)
    assert apply_preset(plain, FAMILIES["Mistral-7B"]) is plain


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_gives_kto_a_micro_batch_of_two_or_more(preset, name):
    try:
        found = apply_preset(TrainingSettings(preset=preset, method="kto"), FAMILIES[name])
    except TrainingError as error:
        assert f"{name} does not fit preset {preset}: with qlora, per_device_train_batch_size 2" in str(error)
        return
    assert found.per_device_train_batch_size >= 2
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 16


@pytest.mark.parametrize(
    ("accumulation", "method", "found"),
    [(4, "sft", (4, "lora")), (1, "sft", (4, "lora")), (32, "sft", (1, "lora")), (16, "kto", (2, "qlora"))],
)
def test_with_fixed_accumulation_an_update_has_at_most_16_examples(accumulation, method, found):
    llama, own = FAMILIES["Llama-3.1-8B"], {"gradient_accumulation_steps": accumulation, "method": method}
    filled = apply_preset(TrainingSettings(preset="24gb", **own), llama)
    assert fits(llama, filled, machine_of("24gb"))
    assert (filled.per_device_train_batch_size, filled.adapter, filled.gradient_accumulation_steps) == (
        *found,
        accumulation,
    )


def test_checkpointing_small_batches_and_four_bits_need_less_memory():
    def gib(**settings):
        return estimate_memory(FAMILIES["Llama-3.1-8B"], TrainingSettings(**settings), "gpu", bf16=True).bytes / 2**30

    assert gib() > gib(gradient_checkpointing=True) > gib(gradient_checkpointing=True, per_device_train_batch_size=1)
    assert 16 < gib(gradient_checkpointing=True, per_device_train_batch_size=1) < 19
    assert gib(gradient_checkpointing=True, per_device_train_batch_size=1, adapter="qlora") < 11


def test_padded_batches_with_trained_embeddings_need_all_logits(tmp_path):
    def logits(kind, tied=True, **settings):
        config = {**CONFIG, "model_type": kind, "tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = TrainingSettings(
            per_device_train_batch_size=4, max_length=2048, gradient_checkpointing=True, **settings
        )
        (loss,) = [
            part
            for part in estimate_memory(architecture_of(str(tmp_path)), asked, "gpu", bf16=True).parts
            if part.name in {"loss", "gradients"}
        ]
        return f"of {4 * 2048} tokens x 256,000 tokens of vocabulary" in loss.formula

    assert logits("gemma2", trainable_token_indices=(5,))
    assert logits("gemma2", trainable_token_indices="all")
    assert not logits("gemma2")
    assert not logits("gemma2", tied=False, trainable_token_indices=(5,))
    assert not logits("llama", trainable_token_indices=(5,))
    assert not FAMILIES["gemma-3-12b"].padding_free and FAMILIES["Qwen3-8B"].padding_free


CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 256000,
}  # fmt: skip


def test_a_layer_keeps_what_is_estimated():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    def kept(layers):
        config = _config(layers)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear")).train()
        owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen, alive = {}, []

        def pack(tensor):
            alive.append(tensor)
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids, mask = torch.randint(0, 512, (2, 128)), torch.ones(2, 128, dtype=torch.long)
        mask[0, -5:] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(size for place, size in seen.items() if place not in owned)

    architecture = read_architecture(PROJECT_ROOT / "data" / "starter_model" / "config.json", "starter")
    measured = (kept(3) - kept(1)) / 2 / 256
    assert layer_bytes(architecture, TrainingSettings(), False, 128) == pytest.approx(measured, rel=0.01)


def _config(layers):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(PROJECT_ROOT / "data" / "starter_model")
    config.num_hidden_layers = layers
    return config
