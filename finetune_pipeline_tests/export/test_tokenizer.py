"""The GGUF has the chat template and tokenization of training, whatever the files and name of a folder."""

import json
import shutil

import pytest

from finetune_pipeline.export.gguf import convert
from finetune_pipeline.export.parity import tokenizer_parity
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.export.tokenizer import chat_template, gguf_name, stage
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.records import chat_messages

from ..training.conftest import STARTER

PARTS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ONE = PARTS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHER = "OTHER " + ONE
SAMPLES = [chat_messages("", "2 hr concrete wall"), chat_messages("Answer in JSON.", " 007  \n walls ")]


def named(**templates):
    return [{"name": name, "template": text} for name, text in templates.items()]


# Content of tokenizer_config.json, chat_template.jinja, additional_chat_templates/ and chat_template.json.
FILES = {
    "config alone": (ONE, None, {}, None),
    "jinja alone": (None, ONE, {}, None),
    "jinja and another in the config": (OTHER, ONE, {}, None),
    "named in the config": (named(tool_use=OTHER, default=ONE), None, {}, None),
    "named in the config and jinja": (named(tool_use=OTHER, default=OTHER), ONE, {}, None),
    "named in the config, none the default": (named(tool_use=OTHER), None, {}, None),
    "additional and jinja": (OTHER, ONE, {"tool_use": OTHER}, None),
    "additional has the default": (OTHER, OTHER, {"default": ONE}, None),
    "additional and the config": (OTHER, None, {"tool_use": ONE}, None),
    "a processor's and jinja": (None, ONE, {}, OTHER),
    "a processor's alone": (None, None, {}, OTHER),
    "none": (None, None, {}, None),
}
GETS_NONE = {name for name in FILES if name.endswith(("alone", "none")) and FILES[name][:3] == (None, None, {})} | {
    "named in the config, none the default", "additional and the config"
}  # fmt: skip


def write_templates(folder, config, jinja, additional, legacy):
    document = json.loads((folder / "tokenizer_config.json").read_text())
    document.pop("chat_template", None)
    if config is not None:
        document["chat_template"] = config
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    for name, text in additional.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    if legacy is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": legacy}))


def tokenizer_alone(folder):
    folder.mkdir(parents=True)
    for path in STARTER.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.mark.parametrize("case", FILES)
def test_the_template_is_the_one_that_transformers_resolves(tmp_path, case):
    from transformers import AutoTokenizer

    folder = tokenizer_alone(tmp_path / "base")
    write_templates(folder, *FILES[case])
    try:
        expected = AutoTokenizer.from_pretrained(folder).get_chat_template()
    except ValueError:
        expected = None
    assert chat_template(folder) == expected == (None if case in GETS_NONE else ONE)
    stage(folder, folder, tmp_path / "staged")
    assert chat_template(tmp_path / "staged") == expected
    config = json.loads((tmp_path / "staged" / "tokenizer_config.json").read_text())
    assert config.get("chat_template") == expected  # read by the converter
    assert (tmp_path / "staged" / "tokenizer.model").samefile(folder / "tokenizer.model")


@pytest.mark.parametrize("case", ["jinja and another in the config", "named in the config and jinja"])
def test_the_gguf_renders_as_training_does(random_base, tmp_path, case):
    base = shutil.copytree(random_base, tmp_path / "base")
    write_templates(base, *FILES[case])
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    convert(base, tmp_path / "out" / "model.gguf")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    with Engine(ModelSpec(gguf=tmp_path / "out" / "model.gguf", context=256)) as engine:
        assert not engine.render(SAMPLES[0]).startswith("OTHER")
        assert tokenizer_parity(base, engine, "Answer in JSON.", SAMPLES).differences == ()


NAMES = ["my-base", "Phi-3-mini-4k-instruct", "phi3", "a-PHI-3.5-tune", "modern-bert"]


def swallowing(folder):
    """Make special tokens absorb the white space after them, as in Phi-3."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    tokens = config["added_tokens_decoder"]
    for token in tokens.values():
        token["rstrip"] = token["content"] not in {"<unk>", "<s>"}
    tokens["1024"] = {**tokens["1"], "content": "<|endoftext|>"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["folder", "published", "cache"])
def test_only_the_tokenizer_decides_the_gguf_name(tmp_path, name, place):
    places = {"folder": name, "published": "base", "cache": f"models--org--{name}/snapshots/0123abc"}
    base = tokenizer_alone(tmp_path / places[place])
    (base / "config.json").write_text(json.dumps({"_name_or_path": f"org/{name}"} if place == "published" else {}))
    plain = gguf_name(base)
    assert not any(word in plain.lower() for word in ("phi-3", "phi3", "modern-bert"))
    assert plain.replace(" ", "-").lower().endswith(name.lower().replace("phi3", "phi-3").rpartition("-")[2])
    swallowing(base)
    assert any(word in gguf_name(base).lower() for word in ("phi-3", "phi3")) and "modern-bert" not in gguf_name(base)


def test_a_local_path_is_not_a_name(tmp_path):
    base = tokenizer_alone(tmp_path / "mine")
    (base / "config.json").write_text(json.dumps({"_name_or_path": "/home/ann/models/phi-3"}))
    assert gguf_name(base) == "mine"


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    base = tokenizer_alone(tmp_path / "mine")
    (base / "tokenizer_config.json").write_text("{")
    with pytest.raises(ExportError, match=r"tokenizer_config\.json is not JSON"):
        chat_template(base)


@pytest.mark.parametrize("name", ["my-base", "Phi-3-mini"])
@pytest.mark.parametrize("swallows", [False, True])
def test_tokens_equal_those_of_training_for_any_folder_name(random_base, tmp_path, name, swallows):
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(random_base, tmp_path / name)
    if swallows:
        swallowing(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(1025)
        model.save_pretrained(base)
    gguf = tmp_path / "model.gguf"
    convert(base, gguf)
    with Engine(ModelSpec(gguf=gguf, context=256)) as engine:
        assert tokenizer_parity(base, engine, "Answer in JSON.", SAMPLES).differences == ()
