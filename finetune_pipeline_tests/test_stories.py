"""The trained model of the tests is what `scripts/make_test_models.py` writes."""

import json
import runpy

import pytest
from gguf import GGUFReader

from finetune_pipeline.export.gguf import convert
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.stories import STORIES, STORIES_GGUF, STORY

script = runpy.run_path(str(PROJECT_ROOT / "scripts" / "make_test_models.py"))


def test_the_files_are_those_of_the_current_script():
    recorded = json.loads((STORIES / script["CHECKSUMS"]).read_text(encoding="utf-8"))
    assert script["checksums"](STORIES) == recorded, "run scripts/make_test_models.py"
    assert script["OPENING"] == STORY


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_the_script_writes_the_same_tokenizer_again(tmp_path, name):
    script["write_tokenizer"](tmp_path)
    assert (tmp_path / name).read_bytes() == (STORIES / name).read_bytes()


def contents(gguf):
    """Return the metadata and the tensors of a GGUF."""
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return metadata, {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}


def test_the_gguf_is_converted_from_the_folder(tmp_path):
    convert(STORIES, tmp_path / "model.gguf")
    assert contents(tmp_path / "model.gguf") == contents(STORIES_GGUF)


def test_the_files_stay_small():
    assert sum(path.stat().st_size for path in STORIES.iterdir()) < 1_000_000
