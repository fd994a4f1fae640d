"""Tiny models: a trained one, and a random Llama with the starter model's tokenizer."""

import shutil

import pytest

from ..stories import STORIES
from ..training.conftest import random_model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}: {% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """Return a trained Llama of 3 layers as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "stories"
    shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.gguf", "checksums.json"))
    return folder


@pytest.fixture(scope="session")
def chatty_stories(stories, tmp_path_factory):
    """Return the same with a chat template, so that it can be trained."""
    folder = tmp_path_factory.mktemp("base") / "stories"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory):
    """Return a random Llama with rows of 256 and the tokenizer of the starter model."""
    return random_model(
        tmp_path_factory.mktemp("base") / "random", "Llama", hidden_size=256, intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
