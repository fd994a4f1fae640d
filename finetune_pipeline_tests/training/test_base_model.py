"""Checks of the base model, without loading torch."""

import json
import subprocess
import sys

import numpy
import pytest
import safetensors.numpy

from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.base_model import check_base_model, check_target_modules
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import JobConfig, TrainingError

TENSORS = {"a": numpy.zeros(2, numpy.float32), "b": numpy.ones(3, numpy.float32)}
WEIGHTS = safetensors.numpy.save(TENSORS)
WHOLE = {"config.json": "{}", "model.safetensors": WEIGHTS, "tokenizer.json": "{}", "chat_template.jinja": "{{ m }}"}
NO_TEMPLATE = {name: content for name, content in WHOLE.items() if name != "chat_template.jinja"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def index(**shards):
    return json.dumps({"weight_map": {tensor: f"model-{shard}.safetensors" for tensor, shard in shards.items()}})


def sharded(**files):
    names = {"index": "model.safetensors.index.json", "one": "model-1.safetensors", "two": "model-2.safetensors"}
    return {"model.safetensors": None, **{names[name]: content for name, content in files.items()}}


def write(folder, files):
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"model.safetensors": None}, "no safetensors weights"),
        ({"model.safetensors": None, "adapter_model.safetensors": WEIGHTS}, "only adapter_model.safetensors"),
        ({"model.safetensors": None, "pytorch_model.bin": ""}, "only as pickle .pytorch_model.bin.*refused"),
        (sharded(index=index(a=1, b=2), one=WEIGHTS), "lacks model-2.safetensors, which its index names"),
        (sharded(index=index(a=1, c=1), one=WEIGHTS), "lacks 1 tensor that .* says it has, such as c;"),
        (sharded(index="{}", one=WEIGHTS), "has no weight_map"),
        (sharded(index='{"weight_', one=WEIGHTS), r"index\.json cannot be read as JSON"),
        (sharded(index=index(a=1, b=2), one=WEIGHTS, two=WEIGHTS[:-1]), r"model-2\.safetensors .* incomplete"),
        ({"model.safetensors": b""}, r"model\.safetensors \(0 bytes\) is damaged or incomplete .*; download"),
        ({"model.safetensors": WEIGHTS[:-1]}, r"model\.safetensors .* is damaged or incomplete"),
        ({"model.safetensors": WEIGHTS[:20]}, r"model\.safetensors .* is damaged or incomplete"),
        ({"model.safetensors": (2**40).to_bytes(8, "little") + WEIGHTS[8:]}, r"model\.safetensors .* is damaged or"),
        ({"model.safetensors": (2**63 + 1).to_bytes(8, "little")}, r"model\.safetensors .* is damaged or incomplete"),
        ({"model.safetensors": WEIGHTS[:8] + b"x" * (len(WEIGHTS) - 8)}, r"model\.safetensors .* is damaged or"),
        (sharded(index=index(a=1, b=2), one=WEIGHTS, two=b""), r"model-2\.safetensors \(0 bytes\) is damaged"),
        (sharded(index='{"weight_map": ["a"]}', one=WEIGHTS), "has no weight_map"),
        (sharded(index='{"weight_map": {"a": null}}', one=WEIGHTS), "lacks None, which its index names"),
        (sharded(index="", one=WEIGHTS), r"index\.json cannot be read as JSON"),
        ({"model.safetensors": None, "model.safetensors.index.json": index(a=1)}, "lacks model-1.safetensors, which"),
        ({"model.safetensors": WEIGHTS + b"0"}, r"model\.safetensors .* is damaged or incomplete"),
        ({"model.safetensors": b"<html>Not found</html>"}, r"model\.safetensors .* is damaged or incomplete"),
        ({"model.safetensors": POINTER}, "pointer of Git LFS instead of the weights; run `git lfs pull`"),
        ({"tokenizer.json": None}, "no tokenizer"),
        ({"tokenizer.json": '{"model": '}, r"tokenizer\.json cannot be read as JSON"),
        ({"config.json": "[]"}, r"config\.json holds \[\] instead of an object"),
        ({"tokenizer_config.json": b"\xff"}, r"tokenizer_config\.json cannot be read as JSON"),
        ({"chat_template.jinja": None}, "no chat template"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, changes, message):
    with pytest.raises(TrainingError, match=message):
        check_base_model(write(tmp_path, {**WHOLE, **changes}))


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors", "model-1.safetensors"])
def test_a_link_to_a_deleted_file_is_named(tmp_path, name):
    link = write(tmp_path, {**WHOLE, **({"model.safetensors": None} if name.startswith("model") else {})}) / name
    link.symlink_to(tmp_path / "blobs" / "deleted")
    with pytest.raises(TrainingError, match=rf"{name} is a link to a file that does not exist; download"):
        check_base_model(tmp_path)


@pytest.mark.parametrize("files", [{}, sharded(index=index(a=1, b=2), one=WEIGHTS, two=WEIGHTS)])
def test_a_complete_model_passes(tmp_path, files):
    check_base_model(write(tmp_path, {**WHOLE, **files}))


@pytest.mark.parametrize(
    ("configured", "names"),
    [
        ("{{ x }}", None),
        ([{"name": "default", "template": "{{ x }}"}, {"name": "rag", "template": "{{ y }}"}], None),
        ([{"name": "rag", "template": "{{ x }}"}, {"name": "tool_use", "template": "{{ y }}"}], "rag, tool_use"),
    ],
)
def test_a_chat_template_may_be_in_the_tokenizer_config(tmp_path, configured, names):
    write(tmp_path, {**NO_TEMPLATE, "tokenizer_config.json": json.dumps({"chat_template": configured})})
    if names is None:
        check_base_model(tmp_path)
    else:
        with pytest.raises(TrainingError, match=rf"special purposes \({names}\).*none with the name default"):
            check_base_model(tmp_path)


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
