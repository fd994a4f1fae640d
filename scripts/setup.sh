#!/usr/bin/env bash
# Create .venv and install the versions pinned in constraints.txt. `make` runs this; a second run installs what is missing.
#
#   PYTHON           Python to use (3.11 or 3.12); default python3.11
#   TORCH_INDEX_URL  package index for torch, to get a CPU-only or another CUDA build (see docs/how-to/install.md)
#   CMAKE_ARGS       options for compiling llama.cpp; default: portable, CPU only
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=.venv
# With -march=native, llama.cpp crashes on quantized models on processors with AMX. Image input (LLAVA) is not used and
# takes a fifth of the time to compile.
export CMAKE_ARGS=${CMAKE_ARGS:--DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case "$(uname -s)" in
  MINGW* | MSYS* | CYGWIN*) fail "Windows is not supported directly; install WSL (wsl --install) and run make inside it" ;;
esac
command -v "$PYTHON" >/dev/null || fail "$PYTHON was not found; install Python 3.11, or set another one: make setup PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
  fail "$("$PYTHON" --version) was found, but 3.11 or 3.12 is needed; set one: make setup PYTHON=/path/to/python3.11"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler was found; install one (Debian: apt-get install g++; macOS: xcode-select --install)"

started=$SECONDS
if [ ! -x $VENV/bin/python ]; then
  say "creating $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv $VENV || fail "$VENV could not be created (Debian: apt-get install python3-venv)"
fi
pip() { $VENV/bin/python -m pip "$@"; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }

say "torch $(pinned torch)"
pip install -q -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

llama=$(pinned llama_cpp_python)
build="$llama $CMAKE_ARGS"
if [ "$(cat $VENV/share/llama.cpp/BUILD 2>/dev/null)" != "$build" ]; then
  say "llama.cpp (llama-cpp-python $llama; compiling takes about 4 minutes)"
  rm -f $VENV/share/llama.cpp/BUILD  # the build is complete only at the end of this block
  # Without the cache: pip identifies a cached wheel by version alone, so it would install one with other CMAKE_ARGS.
  pip uninstall -q -y llama_cpp_python 2>/dev/null
  pip install -q -c constraints.txt --no-cache-dir --no-binary llama_cpp_python llama_cpp_python
  # The source package contains llama.cpp's converter of exactly this version; the wheel does not.
  source=$(mktemp -d)
  trap 'rm -rf "$source"' EXIT
  pip download -q --no-deps --no-binary llama_cpp_python -d "$source" "llama_cpp_python==$llama"
  $VENV/bin/python - "$source" <<'PYTHON'
import pathlib, sys, tarfile
folder = pathlib.Path(sys.argv[1])
with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
    parts = [(member, pathlib.PurePath(member.name).parts) for member in archive.getmembers()]
    wanted = [m for m, p in parts if p[1:3] == ("vendor", "llama.cpp") and (
        p[3:4] in [("conversion",), ("gguf-py",), ("LICENSE",)] or p[-1] in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"))]
    archive.extractall(folder, members=wanted, filter="data")
PYTHON
  rm -rf $VENV/share/llama.cpp
  mkdir -p $VENV/share
  mv "$source"/llama_cpp_python-*/vendor/llama.cpp $VENV/share/llama.cpp
  printf '%s\n' "$llama" > $VENV/share/llama.cpp/VERSION
  printf '%s\n' "$build" > $VENV/share/llama.cpp/BUILD
fi

say "the project and its other dependencies"
pip install -q -c constraints.txt -e '.[dev,postgres]'
say "ready after $((SECONDS - started)) s"
