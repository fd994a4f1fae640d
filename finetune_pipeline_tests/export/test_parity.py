"""A GGUF's tokens are compared with training's over conversations of every kind, for each family of tokenizers."""

import pytest

from finetune_pipeline.export.parity import CONTROL_TOKENS, OWN, compare_tokens, parity_conversations
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import chat_messages
from finetune_pipeline_tests.families import chat_template, served_tokens, transformers_tokenizer

KINDS = {
    "without a system prompt",
    "with a system prompt",
    "several turns",
    "punctuation and white space",
    "non-Latin text",
    "empty content",
    CONTROL_TOKENS,
    OWN,
}
CHATS = [chat_messages("", "a brick wall"), chat_messages("Answer in JSON.", "壁 <b>")]


def encoder(name, folder, template, conversations):
    """Return the encoding of llama.cpp with a vocabulary, computed for these conversations."""
    served = served_tokens(name, folder, template, [one.messages for one in conversations])
    by_text = {str(one.messages): found for one, found in zip(conversations, served, strict=True)}

    def encode(messages):
        found = by_text[str(messages)]
        if "refused" in found:
            raise RequestRefused(found["refused"])
        return found["tokens"]

    return encode


@pytest.mark.parametrize(
    ("vocabulary", "template"),
    [
        ("qwen2", "qwen2_5"),
        ("qwen2", "qwen3"),  # processes </think> in an answer
        ("llama-bpe", "llama3_1"),
        ("gemma-4", "gemma4"),  # takes <|channel> out of answers
        ("qwen2", "gemma"),  # refuses system messages
    ],
)
def test_a_family_reads_the_same_tokens_in_every_kind_of_conversation(tmp_path, vocabulary, template):
    source = chat_template(template)
    tokenizer = transformers_tokenizer(vocabulary, source)
    conversations = parity_conversations(tokenizer, "Answer in JSON.", CHATS)
    found = compare_tokens(tokenizer, encoder(vocabulary, tmp_path, source, conversations), conversations)
    assert found.differences == ()
    assert found.compared.keys() == KINDS - ({"with a system prompt"} if template == "gemma" else set())
    assert sum(found.compared.values()) + found.refused == len(conversations)
    assert (found.refused > 0) == (template == "gemma")


LOOP = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = LOOP.replace("m['content'] }", "m['content']|trim }")
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + LOOP
)  # Qwen 2.5 adds one
NO_HISTORY = LOOP.replace("in messages", "in messages[-2:]")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP


@pytest.mark.parametrize(
    ("served", "kinds"),
    [
        (TRIMS, {"punctuation and white space"}),
        (SYSTEM, KINDS - {"with a system prompt"}),
        (NO_HISTORY, {"several turns", "punctuation and white space", "non-Latin text", CONTROL_TOKENS}),
        (REFUSES, KINDS - {"without a system prompt"}),
        (LOOP.replace("assistant\n", "assistant"), KINDS),
        (LOOP.replace("<|im_end|>\n", "<|im_end|>", 1), KINDS),
    ],
)
def test_a_gguf_with_another_template_differs_in_the_conversations_that_show_it(tmp_path, served, kinds):
    tokenizer = transformers_tokenizer("qwen2", LOOP)
    conversations = parity_conversations(tokenizer, "Answer in JSON.", CHATS)
    found = compare_tokens(tokenizer, encoder("qwen2", tmp_path, served, conversations), conversations)
    assert {difference.kind for difference in found.differences} >= kinds
    for difference in found.differences:
        assert difference.expected != difference.found
        assert "in training and" in difference.first_pair(tokenizer)


def test_a_tokenizer_that_parses_control_tokens_in_content_differs():
    tokenizer = transformers_tokenizer("qwen2", LOOP)

    def parse(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    conversations = parity_conversations(tokenizer, "", CHATS)
    found = compare_tokens(tokenizer, parse, conversations)
    assert {difference.kind for difference in found.differences} == {CONTROL_TOKENS}


def test_a_tokenizer_for_another_script_differs_in_non_latin_text():
    tokenizer = transformers_tokenizer("qwen2", LOOP)

    def replace_unknown(messages):
        plain = [{**one, "content": one["content"].encode("ascii", "replace").decode()} for one in messages]
        return tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)

    conversations = [one for one in parity_conversations(tokenizer, "") if one.kind != CONTROL_TOKENS]
    found = compare_tokens(tokenizer, replace_unknown, conversations)
    assert {difference.kind for difference in found.differences} == {"non-Latin text"}
