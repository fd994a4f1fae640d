"""What is refused as a base model, and that asking costs nothing."""

import json
import subprocess
import sys

import pytest

from finetune_pipeline.training.base_model import check_base_model
from finetune_pipeline.training.job import TrainingError

WHOLE = {
    "config.json": "{}",
    "model.safetensors": "",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("without", "instead", "said"),
    [
        ("config.json", {}, "has no config.json"),
        ("model.safetensors", {}, "no safetensors weights"),
        ("model.safetensors", {"pytorch_model.bin": ""}, "pickle only .pytorch_model.bin.*refused"),
        ("model.safetensors", {"model-1.safetensors": "", "model.safetensors.index.json": INDEX}, "lacks model-2"),
        ("tokenizer.json", {}, "no tokenizer"),
        ("chat_template.jinja", {}, "no chat template"),
    ],
)
def test_what_is_missing_is_named(tmp_path, without, instead, said):
    files = {name: text for name, text in WHOLE.items() if name != without}
    with pytest.raises(TrainingError, match=said):
        check_base_model(write(tmp_path, {**files, **instead}))


def test_a_whole_model_passes(tmp_path):
    check_base_model(write(tmp_path, WHOLE))


def test_a_chat_template_may_stand_in_the_tokenizer_config(tmp_path):
    files = {name: text for name, text in WHOLE.items() if name != "chat_template.jinja"}
    check_base_model(write(tmp_path, {**files, "tokenizer_config.json": json.dumps({"chat_template": "{{ x }}"})}))


def test_launching_and_asking_for_backends_load_no_torch():
    code = (
        "import sys, finetune_pipeline.training.launch, finetune_pipeline.export.model, finetune_pipeline.export.base;"
        "from finetune_pipeline.training.backends import available_backends; available_backends();"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'llama_cpp'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
