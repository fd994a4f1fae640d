"""A GGUF declares the special tokens of training, and the tokens that end an answer."""

import json
from dataclasses import replace

import llama_cpp
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_pipeline.export.special_tokens import read_special_tokens
from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.native import NativeVocabulary
from finetune_pipeline_tests.families import chat_template, tokenizer, transformers_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
WITH_EOS = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
BETWEEN = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
TURN = "<|START_OF_TURN_TOKEN|>{{ m['content'] }}<|END_OF_TURN_TOKEN|>"
NAMES = "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ 'b' if bos_token is defined }}{{ cls_token }}{{ eos_token }}"
EVERY_NAME = NAMES + "{% for m in messages %}" + TURN + "{% endfor %}"
MESSAGES = [{"role": "user", "content": "In Utah, 2 walls"}]
END = "<|END_OF_TURN_TOKEN|>"  # llama.cpp does not know this text


@pytest.fixture
def export(tmp_path):
    """Return a function that makes a base model and its GGUF; both have only a vocabulary."""

    def make(family, template, generation=None, config=None, bos=True, eos=True, **special):
        base = tmp_path / "base"
        trained = transformers_tokenizer(family, template)
        trained.bos_token = trained.bos_token if bos else None
        trained.eos_token = trained.eos_token if eos else None
        for name, text in special.items():
            setattr(trained, name, text)
        trained.save_pretrained(base)
        (base / "config.json").write_text(json.dumps(config or {}))
        if generation is not None:
            (base / "generation_config.json").write_text(json.dumps(generation))
        bare = replace(tokenizer(family), special={})  # as from a converter that found none
        bare.write(tmp_path / "model.gguf", template, read_special_tokens(base).declare)
        return trained, NativeVocabulary(tmp_path / "model.gguf")

    return make


def ends_of(model):
    return {token for token in range(model.n_vocab) if model.is_end_of_generation(token)}


def ends_for_other_servers(model):
    return {token for token in range(model.n_vocab) if llama_cpp.llama_vocab_is_eog(model.vocab, token)}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize(
    ("family", "template"), [("qwen2", CHATML), ("command-r", EVERY_NAME), ("llama-bpe", chat_template("llama3_1"))]
)
def test_a_model_without_bos_or_eos_has_no_ordinary_token_in_their_place(export, family, template, bos, eos):
    trained, model = export(family, template, bos=bos, eos=eos)
    assert model.template.render(MESSAGES).text == tokenizer_chat_template(trained).render(MESSAGES).text
    assert model.template.tokens(MESSAGES) == tokenizer_chat_template(trained).tokens(MESSAGES)
    special = {token for token, kind in enumerate(tokenizer(family).tokens) if kind[1] != 1}
    assert ends_of(model) <= special and ends_for_other_servers(model) <= special
    assert tokenizer_chat_template(trained).end_token() in ends_of(model) & ends_for_other_servers(model)
    assert llama_cpp.llama_vocab_bos(model.vocab) in special and llama_cpp.llama_vocab_eos(model.vocab) in special
    assert bos or not model.adds_bos


@pytest.mark.parametrize("names", [{}, {"pad_token": "<PAD>"}, {"unk_token": "<UNK>", "cls_token": "<|USER_TOKEN|>"}])
def test_other_special_tokens_are_the_same_in_every_template(export, names):
    trained, model = export("command-r", EVERY_NAME, **names)
    assert model.template.render(MESSAGES).text == tokenizer_chat_template(trained).render(MESSAGES).text
    assert all(text in model.template.render(MESSAGES).text for text in names.values())


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "nemotron_3_nano"])
def test_a_server_that_switches_reasoning_on_gets_the_prompt_of_training(export, name):
    trained, model = export("qwen2", chat_template(name))
    served = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(model.chat_template())
    prompt = served.render(messages=MESSAGES, add_generation_prompt=True, enable_thinking=True)
    finished = tokenizer_chat_template(trained).render(
        [*MESSAGES, {"role": "assistant", "content": "x"}], add_generation_prompt=False
    )
    assert prompt == model.template.render(MESSAGES).text and prompt.endswith("</think>\n\n") == (
        name != "nemotron_3_nano"
    )
    assert finished.text.startswith(prompt + "x")


@pytest.mark.parametrize(
    ("generation", "config", "listed"),
    [
        (None, {}, []),
        ({"eos_token_id": "<|USER_TOKEN|>"}, {}, ["<|USER_TOKEN|>"]),
        ({"eos_token_id": ["<PAD>", "<UNK>"]}, {}, ["<PAD>", "<UNK>"]),
        ({"eos_token_id": ["<PAD>", "<UNK>", "<|USER_TOKEN|>"]}, {}, ["<PAD>", "<UNK>", "<|USER_TOKEN|>"]),
        ({"eos_token_id": [2, 10**6, None]}, {}, [2]),
        ({"eos_token_id": None}, {"eos_token_id": ["<PAD>"]}, []),
        # Without a generation_config.json of its own, a model has the ids of transformers' defaults.
        ({"eos_token_id": [2, "<PAD>"], "_from_model_config": True}, {}, ["<PAD>"]),
        (None, {"eos_token_id": 2}, []),
        (None, {"eos_token_id": ["<PAD>"]}, ["<PAD>"]),
    ],
)
def test_the_ends_of_the_generation_config_end_an_answer(export, generation, config, listed):
    ids = {text: number for number, (text, _) in enumerate(tokenizer("command-r").tokens)}

    def as_ids(document):
        value = (document or {}).get("eos_token_id")
        if isinstance(value, list):
            value = [ids.get(one, one) for one in value]
        return document and {**document, "eos_token_id": ids.get(value, value) if isinstance(value, str) else value}

    _, model = export("command-r", EVERY_NAME, as_ids(generation), as_ids(config), eos=False)
    expected = [ids[END], *(ids.get(one, one) for one in listed)]
    by_text = {ids["<PAD>"]}  # llama.cpp stops at this one in any case
    assert ends_of(model) == {*expected} | by_text
    assert ends_for_other_servers(model) == {*expected[:2]} | by_text  # a GGUF has one key for further ends
    assert model.own_ends == sorted({*expected[2:]} - by_text)


@pytest.mark.parametrize(
    ("template", "eos", "found"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", True, r"only .\\n. after an answer"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", True, "nothing after an answer"),
        (WITH_EOS, False, "nothing after an answer"),
        (CHATML.replace("<|im_end|>", "</s>"), True, r"only .</s>\\n. after an answer"),
        (BETWEEN, True, "nothing after an answer"),
        ("{{ messages[0]['content'] }}<|im_end|>", True, "nothing after an answer"),
        (CHATML, True, None),
        (WITH_EOS, True, None),
    ],
)  # fmt: skip
def test_a_template_without_an_end_is_rejected(template, eos, found):
    trained = transformers_tokenizer("qwen2", template)
    trained.eos_token = trained.eos_token if eos else None
    compiled = tokenizer_chat_template(trained)
    if found is None:
        assert compiled.end_token() == trained.convert_tokens_to_ids("<|im_end|>")
    else:
        with pytest.raises(RequestRefused, match=found):
            compiled.end_token()


def test_a_model_without_any_end_is_not_converted(export):
    with pytest.raises(SystemExit, match="no token ends an answer"):
        export("command-r", "{{ messages[0]['content'] }}", eos=False)
