"""scripts/setup.sh, run with a fake Python that logs its arguments, because compiling llama.cpp takes minutes."""

import os
import shutil
import subprocess
import sys

import pytest

from finetune_pipeline.settings import PROJECT_ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
  "- "*) cat > /dev/null ;;
  *) echo "$*" >> log ;;
esac
if [[ "$*" == *"pip download"* ]]; then
  mkdir -p "$(echo "$*" | sed 's/.* -d \\([^ ]*\\) .*/\\1/')/llama_cpp_python-0/vendor/llama.cpp"
fi
if [[ "$*" == *"--no-binary llama_cpp_python llama_cpp_python"* && -e broken ]]; then exit 1; fi
"""


@pytest.fixture
def clone(tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
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
    compiled = [line for line in log.read_text().splitlines() if "pip install" in line and "--no-binary" in line]
    assert all("--no-cache-dir" in line for line in compiled)
    return bool(compiled), code


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
    assert compiles(clone) == (
        True,
        0,
    )  # the failed build removed the earlier one, although its stamp had these arguments
