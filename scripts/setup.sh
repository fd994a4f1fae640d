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
# With -march=native, llama.cpp crashes on quantized models on processors with AMX. Image input (LLAVA) is not used.
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

llama=$(pinned llama_cpp_python)
build="$llama $CMAKE_ARGS"
compiling=
fetch_source() {
  source=$(mktemp -d)
  trap 'kill $compiling 2>/dev/null || true; rm -rf "$source"' EXIT
  pip download -q --no-deps --no-binary llama_cpp_python -d "$source" "llama_cpp_python==$llama"
  tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source"
}
# Tokenizers (without weights) and chat templates of model families, which the tests read.
take_families() {
  rm -rf $VENV/share/llama.cpp/models
  mkdir -p $VENV/share/llama.cpp/models/templates
  for name in llama-bpe llama-spm phi-3 qwen2; do
    cp "$source"/llama_cpp_python-*/vendor/llama.cpp/models/ggml-vocab-$name.gguf $VENV/share/llama.cpp/models/
  done
  cp "$source"/llama_cpp_python-*/vendor/llama.cpp/models/templates/*.jinja $VENV/share/llama.cpp/models/templates/
}
if [ "$(cat $VENV/share/llama.cpp/BUILD 2>/dev/null)" != "$build" ]; then
  say "llama.cpp (llama-cpp-python $llama) compiles in the background, which takes some minutes"
  rm -f $VENV/share/llama.cpp/BUILD  # the build is complete only at the end of this script
  fetch_source
  # The library of llama.cpp's command-line programs takes long to compile, and the wheel does not contain it.
  sed -i.bak 's/set(LLAMA_BUILD_COMMON ON/set(LLAMA_BUILD_COMMON OFF/' "$source"/llama_cpp_python-*/CMakeLists.txt
  pip wheel -q --no-deps -w "$source/wheel" "$source"/llama_cpp_python-*/ &
  compiling=$!
elif [ ! -d $VENV/share/llama.cpp/models/templates ]; then
  say "tokenizers and chat templates of model families"
  fetch_source
  take_families
fi

say "torch $(pinned torch)"
pip install -q -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

# uv installs the other packages faster than pip, but does not read pip's configuration.
setting() { pip config get "global.$1" 2>/dev/null || true; }
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(setting index-url)}}
export SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}}
[ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX
[ -n "$SSL_CERT_FILE" ] || unset SSL_CERT_FILE
# As pip does: otherwise each process that may not write bytecode, as in most containers, compiles what it imports.
with_uv() { $VENV/bin/uv pip install -q --compile-bytecode --python $VENV/bin/python -c constraints.txt "$@"; }
say "the project and its other dependencies"
pip install -q -c constraints.txt uv || true
if [ -n "$compiling" ]; then
  printf 'llama-cpp-python; python_version < "3"\n' > "$source/not_yet"
  with_uv --override "$source/not_yet" -e '.[console,dev,postgres]' || true  # the last step reports what is wrong
  wait $compiling || fail "llama.cpp could not be compiled; the compiler's messages are above"
  pip install -q --no-deps --force-reinstall "$source"/wheel/*.whl
  # The source package contains llama.cpp's converter of exactly this version; the wheel does not.
  rm -rf $VENV/share/llama.cpp
  mkdir -p $VENV/share/llama.cpp
  (cd "$source"/llama_cpp_python-*/vendor/llama.cpp && cp -R conversion gguf-py LICENSE convert_hf_to_gguf.py convert_lora_to_gguf.py "$OLDPWD/$VENV/share/llama.cpp/")
  take_families
  printf '%s\n' "$llama" > $VENV/share/llama.cpp/VERSION
fi
with_uv -e '.[console,dev,postgres]' || { say "uv failed; pip installs the packages"; pip install -q -c constraints.txt -e '.[console,dev,postgres]'; }
printf '%s\n' "$build" > $VENV/share/llama.cpp/BUILD
say "ready after $((SECONDS - started)) s"
