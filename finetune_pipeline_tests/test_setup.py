"""scripts/setup.sh, run with a fake Python that logs its arguments, because compiling llama.cpp takes minutes."""

import os
import shutil
import subprocess
import sys

import pytest

from finetune_pipeline.settings import PROJECT_ROOT

PYTHON = """#!/usr/bin/env bash
echo "$*" >> log
case "$*" in
  *"pip download"*)
    folder=$(echo "$*" | sed 's/.* -d \\([^ ]*\\) .*/\\1/')
    mkdir -p "$folder/llama_cpp_python-0/vendor/llama.cpp"/{conversion,gguf-py,models/templates}
    for name in ggml-vocab-{llama-bpe,llama-spm,phi-3,qwen2,gpt-2}.gguf templates/a.jinja; do
      touch "$folder/llama_cpp_python-0/vendor/llama.cpp/models/$name"
    done
    touch "$folder/llama_cpp_python-0/vendor/llama.cpp"/{LICENSE,convert_hf_to_gguf.py,convert_lora_to_gguf.py}
    echo '    set(LLAMA_BUILD_COMMON ON CACHE BOOL "" FORCE)' > "$folder/llama_cpp_python-0/CMakeLists.txt"
    tar -czf "$folder/llama_cpp_python-0.tar.gz" -C "$folder" llama_cpp_python-0
    rm -r "$folder/llama_cpp_python-0" ;;
  *"pip wheel"*)
    if [ -e broken ]; then exit 1; fi
    source=${*: -1}
    cp "$source/CMakeLists.txt" built
    wheels=$(echo "$*" | sed 's/.* -w \\([^ ]*\\) .*/\\1/')
    mkdir -p "$wheels"
    touch "$wheels/llama_cpp_python-0-py3-none-any.whl" ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >> log
[ ! -e no_uv ]
"""


@pytest.fixture
def clone(tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (python.parent / "uv").write_text(UV)
    (python.parent / "uv").chmod(0o755)
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT_ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(PROJECT_ROOT / "constraints.txt", tmp_path)
    return tmp_path


def compiles(clone, cmake_args=None):
    """Return whether a run of the script compiles llama.cpp, and its exit status."""
    environment = {**os.environ, "PYTHON": sys.executable, "CXX": "true"}
    environment.pop("CMAKE_ARGS", None)
    if cmake_args is not None:
        environment["CMAKE_ARGS"] = cmake_args
    log = clone / "log"
    log.unlink(missing_ok=True)
    code = subprocess.run([clone / "scripts" / "setup.sh"], env=environment, capture_output=True).returncode
    return "pip wheel" in log.read_text(), code


def test_llama_cpp_is_compiled_again_for_other_cmake_args(clone):
    assert compiles(clone) == (True, 0)
    assert compiles(clone) == (False, 0)
    assert compiles(clone, "-DGGML_NATIVE=OFF -DGGML_CUDA=on") == (True, 0)
    assert compiles(clone, "-DGGML_NATIVE=OFF -DGGML_CUDA=on") == (False, 0)
    assert compiles(clone) == (True, 0)


def test_llama_cpp_is_compiled_again_without_a_build_stamp(clone):
    assert compiles(clone) == (True, 0)
    (clone / ".venv" / "share" / "llama.cpp" / "BUILD").unlink()
    assert compiles(clone) == (True, 0)


def test_a_failed_build_is_retried(clone):
    assert compiles(clone) == (True, 0)
    (clone / "broken").touch()
    assert compiles(clone, "-DGGML_CUDA=on") == (True, 1)
    (clone / "broken").unlink()
    assert compiles(clone) == (True, 0)  # although the stamp of the build before the failed one had these arguments


def test_llama_cpp_is_compiled_without_its_command_line_programs_and_its_converter_is_kept(clone):
    assert compiles(clone) == (True, 0)
    assert "LLAMA_BUILD_COMMON OFF" in (clone / "built").read_text()
    names = {path.name for path in (clone / ".venv" / "share" / "llama.cpp").iterdir()}
    assert names == {
        "BUILD",
        "VERSION",
        "LICENSE",
        "conversion",
        "gguf-py",
        "models",
        "convert_hf_to_gguf.py",
        "convert_lora_to_gguf.py",
    }


def test_the_files_of_model_families_are_taken_without_compiling_again(clone):
    assert compiles(clone) == (True, 0)
    models = clone / ".venv" / "share" / "llama.cpp" / "models"
    taken = {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}
    names = ("llama-bpe", "llama-spm", "phi-3", "qwen2")
    assert taken == {*(f"ggml-vocab-{name}.gguf" for name in names), "templates/a.jinja"}
    shutil.rmtree(models)  # as set up by an earlier version
    assert compiles(clone) == (False, 0)
    assert {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()} == taken
    assert compiles(clone) == (False, 0) and "pip download" not in (clone / "log").read_text()


@pytest.mark.parametrize("uv", [True, False])
def test_pip_installs_the_packages_where_uv_cannot(clone, uv):
    if not uv:
        (clone / "no_uv").touch()
    assert compiles(clone) == (True, 0)
    lines = (clone / "log").read_text().splitlines()
    (torch,) = [number for number, line in enumerate(lines) if line.endswith("torch")]
    with_uv = [number for number, line in enumerate(lines) if line.startswith("uv ")]
    with_pip = [
        line for line in lines if line.startswith("-m pip install") and line.endswith("-e .[console,dev,postgres]")
    ]
    assert all("--compile-bytecode" in lines[number] for number in with_uv)  # pip compiles without being asked
    assert torch < min(with_uv) and len(with_uv) == 2  # uv would take another build of torch than pip's configuration
    assert bool(with_pip) != uv
