"""Errors of the export steps, which leave no files."""

import subprocess
import sys
from importlib import metadata

import pytest

from finetune_pipeline.export.gguf import convert, convert_adapter, converter_folder, quantize
from finetune_pipeline.export.merge import count_parameters, merge
from finetune_pipeline.export.process import ExportError, run


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Return a function that replaces llama.cpp's converter by a script."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(folder))

    def write(script):
        for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
            (folder / name).write_text(script)
        return folder

    return write


def test_the_error_for_a_missing_converter_names_make_setup(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match="make setup"):
        converter_folder()


def test_a_converter_of_another_version_is_rejected(converter):
    folder = converter("")
    (folder / "VERSION").write_text("0.0.1\n")
    with pytest.raises(ExportError, match=r"0\.0\.1, but .* is installed"):
        converter_folder()
    (folder / "VERSION").write_text(metadata.version("llama-cpp-python") + "\n")
    assert converter_folder() == folder


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('BPE not recognized'); raise SystemExit(3)", "status 3. Its last output: BPE not recognized"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV.*GGML_NATIVE=OFF"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL.*memory ran out"),
        ("import os; os.abort()", "SIGABRT; if nobody ended it, use another base model"),
        ("print(' ', flush=True); raise SystemExit(3)", "status 3, without any output$"),
    ],
)
def test_a_failed_conversion_gives_the_reason_and_leaves_nothing(converter, tmp_path, script, message):
    half = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('half')\n"
    converter(half + script)
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=message):
        convert(tmp_path, out / "model.gguf")
    with pytest.raises(ExportError, match=message):
        convert_adapter(tmp_path, tmp_path, out / "adapter.gguf")
    assert list(out.iterdir()) == []


def test_a_file_that_is_not_a_gguf_cannot_be_quantized(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(b"not a GGUF")
    with pytest.raises(ExportError, match=r"quantizing .* failed with exit status"):
        quantize(source, tmp_path / "out.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_that_is_not_an_adapter_cannot_be_merged(tmp_path):
    with pytest.raises(ExportError, match=r"no adapter_config\.json"):
        merge(tmp_path, tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_an_adapter_of_another_model_is_an_error(random_base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=16))
    get_peft_model(other, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"merging (.|\n)*size mismatch"):
        merge(random_base, tmp_path / "adapter", tmp_path / "out")


def test_a_canceled_step_leaves_no_process(monkeypatch):
    started = []

    def interrupt(process, *_):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", "import signal; signal.pause()"], "sleeping")
    assert started[0].poll() is not None


def test_parameters_are_counted_from_the_headers(random_base):
    from transformers import AutoModelForCausalLM

    assert count_parameters(random_base) == AutoModelForCausalLM.from_pretrained(random_base).num_parameters()


@pytest.mark.slow
def test_export_steps_do_not_import_scikit_learn(tmp_path):
    code = (
        "import sys; from finetune_pipeline.export.__main__ import main; main(sys.argv[1:]);"
        "import transformers.generation;"
        "print(sys.modules['sklearn'], [name for name in sys.modules if name.startswith('sklearn.')])"
    )
    step = ["quantize", str(tmp_path / "nothing.gguf"), str(tmp_path / "q.gguf"), "Q8_0"]
    done = subprocess.run([sys.executable, "-c", code, *step], capture_output=True, text=True)
    assert done.stdout.endswith("None []\n"), done.stderr
