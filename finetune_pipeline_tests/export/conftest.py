"""Tiny models: stories260k if available, and a random Llama with the starter model's tokenizer."""

import os
import shutil

import pytest

from finetune_pipeline.settings import PROJECT_ROOT

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the training process; read when torch is loaded

STARTER = PROJECT_ROOT / "data" / "starter_model"
STORIES = PROJECT_ROOT.parent / "shared" / "data" / "stories260k"
SNIPS = PROJECT_ROOT.parent / "shared" / "data" / "snips" / "raw"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}: {% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def stories():
    """Return a pretrained Llama of 260,032 parameters."""
    if not (STORIES / "model.safetensors").exists():
        pytest.skip(f"{STORIES} is not available")
    return STORIES


@pytest.fixture(scope="session")
def chatty_stories(stories, tmp_path_factory):
    """Return stories260k with a chat template, so that it can be trained."""
    folder = tmp_path_factory.mktemp("base") / "stories"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """Return a random Llama with rows of 256 and the tokenizer of the starter model."""
    if not (STARTER / "tokenizer.model").exists():
        pytest.skip(f"{STARTER} is not there; run git checkout data/starter_model")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "random"
    folder.mkdir()
    for path in [*STARTER.glob("tokenizer*"), *STARTER.glob("chat_template.jinja")]:
        shutil.copyfile(path, folder / path.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
