"""Checks of the base model, without loading torch."""

import json
import subprocess
import sys

import pytest

from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.base_model import check_base_model, check_target_modules
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import JobConfig, TrainingError

WHOLE = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("without", "instead", "message"),
    [
        ("config.json", {}, "has no config.json"),
        ("model.safetensors", {}, "no safetensors weights"),
        ("model.safetensors", {"pytorch_model.bin": ""}, "only as pickle .pytorch_model.bin.*refused"),
        ("model.safetensors", {"model-1.safetensors": "", "model.safetensors.index.json": INDEX}, "lacks model-2"),
        ("tokenizer.json", {}, "no tokenizer"),
        ("chat_template.jinja", {}, "no chat template"),
    ],
)
def test_a_missing_file_is_named(tmp_path, without, instead, message):
    files = {name: text for name, text in WHOLE.items() if name != without}
    with pytest.raises(TrainingError, match=message):
        check_base_model(write(tmp_path, {**files, **instead}))


def test_a_complete_model_passes(tmp_path):
    check_base_model(write(tmp_path, WHOLE))


def test_a_chat_template_may_be_in_the_tokenizer_config(tmp_path):
    files = {name: text for name, text in WHOLE.items() if name != "chat_template.jinja"}
    check_base_model(write(tmp_path, {**files, "tokenizer_config.json": json.dumps({"chat_template": "{{ x }}"})}))


def config_alone(folder, kind, tied):
    from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "llama": LlamaConfig(**sizes, intermediate_size=8, tie_word_embeddings=tied),
        "gemma": Gemma3TextConfig(**sizes, intermediate_size=8, head_dim=4, tie_word_embeddings=tied),
        "gpt2": GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied),
        "neox": GPTNeoXConfig(**sizes, intermediate_size=8, tie_word_embeddings=tied),
    }[kind]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["lm_head"]),
        ("llama", ["embed_tokens"]),
        ("llama", ["model.embed_tokens", "lm_head"]),
        ("gemma", ["embed_tokens"]),
        ("gpt2", ["wte"]),
        ("gpt2", ["lm_head"]),
        ("neox", ["embed_in"]),
        ("neox", ["lm_head"]),
    ],
)
def test_lora_on_tied_embeddings_is_refused(tmp_path, kind, names):
    settings = TrainingSettings(lora_target_modules=("q_proj", *names))
    with pytest.raises(TrainingError, match=f"lora_target_modules names {', '.join(names)}, but the output layer"):
        check_target_modules(config_alone(tmp_path / "tied", kind, True), settings)
    check_target_modules(config_alone(tmp_path / "untied", kind, False), settings)


@pytest.mark.parametrize("given", [{}, {"lora_target_modules": ("q_proj", "head")}, {"trainable_token_indices": (3,)}])
def test_other_layers_of_a_tied_model_are_accepted(tmp_path, given):
    check_target_modules(config_alone(tmp_path, "llama", True), TrainingSettings(**given))


def test_tied_embeddings_are_refused_before_weights_are_loaded(tmp_path):
    base = PROJECT_ROOT / "data" / "starter_model"
    settings = TrainingSettings(lora_target_modules=("q_proj", "lm_head"))
    job = JobConfig(base_model=base, dataset=tmp_path / "none", output=tmp_path / "out", settings=settings)
    with pytest.raises(TrainingError, match=r"lora_target_modules names lm_head, .*tie_word_embeddings.*Leave it out"):
        train(job)


def test_starting_a_run_and_listing_backends_load_no_torch():
    code = (
        "import sys, finetune_pipeline.training.child_process;"
        "import finetune_pipeline.export.model, finetune_pipeline.export.base;"
        "from finetune_pipeline.training.backends import available_backends; available_backends();"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'llama_cpp'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
