"""What a base model's tokenizer and chat template decide is found before training."""

import json
import re
import shutil
from pathlib import Path

import pytest

from finetune_pipeline.export import base_check
from finetune_pipeline.export.base_check import check_here, check_vocabulary, missing_embeddings, template_problem
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.export.special_tokens import unusable_ends
from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.records import Turn
from finetune_pipeline_tests.families import chat_template, transformers_tokenizer

from ..training.conftest import STARTER

BASE = Path("/models/base")
MESSAGES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LOOP = MESSAGES + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP
UNKNOWN_ROLE = LOOP.replace("{{ m['role'] }}", "{{ {'user': 'user', 'assistant': 'assistant'}[m['role']] + '' }}")
IGNORES = LOOP.replace("%}<|im_start|>", " if m['role'] != 'system' %}<|im_start|>", 1)
ONE_TURN = "{% if messages|length > 3 %}{{ raise_exception('one question only') }}{% endif %}" + LOOP
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + LOOP
NO_END = LOOP.replace("<|im_end|>", "")
NO_THOUGHT = LOOP.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%")
THOUGHT = LOOP.replace(
    "{{ m['content'] }}", "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' }}{{ m['content'] }}"
)
PLAIN_ROLE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
DIRECT = "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' }}{% endfor %}"
HIDDEN = LOOP.replace("{{ m['content'] }}", "{{ ('<|endoftext|>' if m['role'] == 'assistant') ~ m['content'] }}")
LATER = LOOP.replace("assistant\n{%", "assistant\n{{ '<think>' if messages|length > 2 }}{%")
CUT_ANSWER = "{{ m['content'][:20] if m['role'] == 'assistant' else m['content'] }}"
LAST_ONLY = "{% for m in messages[-1:] if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endfor %}"
ENDS = [
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<turn|>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|channel|>",
    "<|message|>",
]
REASONING = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano")
TURNS = [Turn(role="user", content="a"), Turn(role="assistant", content="b")]


@pytest.mark.parametrize(
    ("template", "system_prompt", "histories", "found"),
    [
        (LOOP, "Answer in JSON.", [TURNS], None),
        (NO_SYSTEM, "", [], None),
        (NO_SYSTEM, "Answer in JSON.", [], r"system_prompt: .*/models/base rejects system messages \(no system role\)"),
        (UNKNOWN_ROLE, "Answer in JSON.", [], "system_prompt: .* rejects system messages"),
        (IGNORES, "Answer in JSON.", [], "system_prompt: .* leaves out or changes the system message"),
        (IGNORES, "", [], None),
        (ONE_TURN, "Answer in JSON.", [], None),
        (
            ONE_TURN,
            "",
            [TURNS],
            r"this loop's data \(one question only\), which have earlier messages \(user, assistant",
        ),
        (ONE_TURN, "", [TURNS, TURNS[:1]], None),
        (NEEDS_SYSTEM, "Answer in JSON.", [TURNS], None),
        (NEEDS_SYSTEM, "", [], r"rejects a question with an answer \(no system message\)"),
        (NO_END, "", [], r"base: The model's chat template writes only .* and no control token"),
        (LAST_ONLY, "", [], "leaves out or changes the last user message"),
        (LOOP.replace("content'] }", "content'][:20] }"), "", [], "leaves out or changes the last user message"),
        (LOOP.replace("content'] }", "content']|upper }"), "Answer in JSON.", [], "changes the last user message"),
        (LOOP.replace("{{ m['content'] }}", CUT_ANSWER), "", [], "leaves out or changes the answer"),
        (MESSAGES, "", [], r"writes 'assistant\\n' before a finished answer, but not .*\(add_generation_prompt\)"),
        (PLAIN_ROLE, "", [], "writes 'assistant: ' before a finished answer"),
        (DIRECT, "Answer in JSON.", [TURNS], None),
        (HIDDEN, "", [], None),  # the engine returns no control tokens
        (
            NO_THOUGHT,
            "",
            [],
            r"prompt ends in '<think>\\n\\n</think>\\n\\n', but a finished answer in 'answer<\|im_end",
        ),
        (LATER, "", [], None),
        (LATER, "", [TURNS], "after earlier messages, .* prompt ends in '<think>', but a finished answer in 'answer"),
        (chat_template("gemma"), "Answer in JSON.", [], "system_prompt: .* rejects system messages"),
        (chat_template("gptoss"), "", [], "writes 'final' before a finished answer"),
        (chat_template("deepseek_r1_distill"), "", [], r"<think>\\n', but .* the generation prompt is the text that"),
        (THOUGHT, "", [], r"writes '<think>\\n\\n</think>\\n\\n' before a finished answer, but not"),
        (
            chat_template("mistral"),
            "Be brief.",
            [],
            r"system_prompt: with it, .*\[INST\]Be brief.*leave system_prompt",
        ),
        (chat_template("mistral"), "", [TURNS], None),
        *((chat_template(name), "Be brief.", [TURNS], None) for name in ("llama3_1", "gemma4", "phi3_5", "cohere2")),
        *((chat_template(name), "Be brief.", [TURNS], None) for name in REASONING),
        (LATER, "", [[], TURNS], "after earlier messages, .* prompt ends in '<think>'"),
        (ONE_TURN, "", [[], TURNS], None),
    ],
)
def test_what_a_chat_template_does_not_render_is_named(template, system_prompt, histories, found):
    tokens = transformers_tokenizer("qwen2", template)
    tokens.add_tokens([end for end in ENDS if end in template], special_tokens=True)
    problem = template_problem(BASE, tokenizer_chat_template(tokens), system_prompt, histories)
    assert problem == "" if found is None else re.search(found, problem), problem


def changed_starter(folder, change):
    shutil.copytree(STARTER, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    change(folder)
    return folder


def edit(name, **changes):
    def apply(folder):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, **changes}))

    return apply


def qwen(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    transformers_tokenizer("qwen2", LOOP).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: None, None),
        (qwen, "converter does not know the pre-tokenizer of"),
        (edit("config.json", architectures=["NobodysForCausalLM"]), "NobodysForCausalLM is not supported"),
        (edit("tokenizer_config.json", added_tokens_decoder={}), r"token 0 is 4 \('<\|im_start\|>'\) in training and"),
        (
            edit("generation_config.json", _from_model_config=False, eos_token_id=[5, 99999, "5"]),
            "has 99999, '5', but .* 0 to 1,023",
        ),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"damaged"), "tokenizer of .* cannot be loaded"),
    ],
)
def test_what_the_converter_and_llama_cpp_decide_is_found(tmp_path, change, found):
    problems = check_vocabulary(changed_starter(tmp_path / "base", change), "Answer in JSON.", ["a wall"])
    if found is None:
        assert problems == []
    else:
        assert len(problems) == 1 and re.search(found, problems[0]), problems


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            edit("config.json", vocab_size=3),
            r"config\.json: vocab_size is 3, but .* has ids up to 1,023 .*least 1,024 are",
        ),
        (
            edit("tokenizer_config.json", chat_template="{% for"),
            r"template of \S+/base is not valid jinja \(.*; correct",
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages | }}"),
            r"template of \S+/base is not valid jinja \(.*; correct chat_template\.jinja in the folder",
        ),
    ],
)
def test_what_cannot_be_converted_is_found_before(tmp_path, change, found):
    base = changed_starter(tmp_path / "base", change)
    request = {"system_prompt": "", "prompts": [], "histories": [], "schema": None}
    (tmp_path / "request.json").write_text(json.dumps(request))
    check_here(base, tmp_path / "no_converter.py", tmp_path)
    [problem] = json.loads((tmp_path / "problems.json").read_text())
    assert re.search(found, problem) and "plain `prompt`" not in problem


@pytest.mark.parametrize(
    ("config", "pad", "enough"),
    [
        ({"vocab_size": 704}, None, True),
        ({"vocab_size": 1024}, None, True),
        ({"vocab_size": 703}, None, True),  # the last token is for images, and no text becomes it
        ({"vocab_size": 703}, "<image_soft_token>", False),
        ({"vocab_size": 702}, None, False),  # <|im_end|>
        ({"text_config": {"vocab_size": 702}}, None, False),
        ({"vocab_size": 1024, "text_config": {"vocab_size": 702}}, None, False),
        ({}, None, True),
    ],
)
def test_a_vocabulary_larger_than_the_embeddings_is_named(tmp_path, config, pad, enough):
    tokens = transformers_tokenizer("qwen2", LOOP)
    tokens.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokens.pad_token = pad
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (missing_embeddings(tmp_path, tokens) == "") == enough


@pytest.mark.parametrize(
    ("config", "unusable"),
    [
        ({"eos_token_id": [700, 702]}, []),
        ({"eos_token_id": None}, []),
        ({"eos_token_id": 703}, [703]),
        ({"eos_token_id": -1}, [-1]),
        ({"eos_token_id": "5"}, ["5"]),
        ({"eos_token_id": [702, 99999, "<|im_end|>", 1.5]}, [99999, "<|im_end|>", 1.5]),
        ({"eos_token_id": 99999, "_from_model_config": True}, []),  # a default of transformers
        (None, []),
    ],
)
def test_an_end_that_the_tokenizer_does_not_have_is_named(tmp_path, config, unusable):
    (tmp_path / "config.json").write_text('{"eos_token_id": 99999}')
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert unusable_ends(tmp_path, transformers_tokenizer("qwen2", LOOP)) == unusable


@pytest.mark.slow
def test_a_schema_that_the_vocabulary_cannot_write_is_named(tmp_path):
    base = changed_starter(tmp_path / "base", lambda folder: None)
    wide = {"type": "object", "properties": {f"p{n}": {"enum": [f"v{n}"]} for n in range(499)}}
    assert check_vocabulary(base, "", ["a wall"], schema={"enum": ["wall", "\U0001f600 é"]}) == []
    assert check_vocabulary(base, "", ["a wall"], schema=wide) == []
    (problem,) = check_vocabulary(base, "", ["a wall"], schema={"enum": [], "type": "string"})
    assert re.search("the output_schema cannot be enforced while decoding with .*serving.constrain: none", problem)


def test_the_result_is_cached_by_the_content_of_the_tokenizer(tmp_path, monkeypatch):
    base = changed_starter(tmp_path / "base", lambda folder: None)
    asked = []

    def step(name, arguments, *_):
        asked.append(name)
        (Path(arguments[-1]) / "problems.json").write_text(json.dumps([f"problem {len(asked)}"]))

    monkeypatch.setattr(base_check, "run_step", step)
    assert [check_vocabulary(base, "", ["a"]) for _ in range(2)] == [["problem 1"]] * 2
    assert check_vocabulary(base, "Answer in JSON.", ["a"]) == ["problem 2"]
    edit("generation_config.json", eos_token_id=[1])(base)
    assert check_vocabulary(base, "", ["a"]) == ["problem 3"]


def test_a_temporary_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(ExportError, match=r"cannot be checked, because a temporary file cannot be written .*TMPDIR"):
        check_vocabulary(changed_starter(tmp_path / "base", lambda folder: None), "")
