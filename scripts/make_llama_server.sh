#!/usr/bin/env bash
# Build llama-server from the source package of the pinned llama-cpp-python, so it is the version that serves here.
#
#   scripts/make_llama_server.sh [FOLDER]   default: data/state/llama-server; built once, then reused (10 to 30 minutes)
#
#   CMAKE_ARGS   options for compiling llama.cpp; default: portable, CPU only, as in scripts/setup.sh
#   JOBS         compilers at a time; default: all cores
#
# Prints the path of llama-server, which needs no other file. `make test-servers` uses it, and so does
# `LLAMA_SERVER=FOLDER/llama-server python -m benchmarks parallel_decoding`.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-data/state/llama-server}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
version=$(sed -n 's/^llama_cpp_python==//p' constraints.txt)
# Without the web page, whose files would be downloaded, and in one file without libraries beside it.
options="${CMAKE_ARGS:--DGGML_NATIVE=OFF} -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF"
build="$version $options"

exec 9>"$folder/lock"
if command -v flock >/dev/null; then flock 9; fi  # macOS has none
if [ "$(cat "$folder/BUILD" 2>/dev/null)" != "$build" ]; then
  started=$SECONDS
  source=$(mktemp -d)
  trap 'rm -rf "$source"' EXIT
  "${PYTHON:-python3.11}" -m venv "$source/tools"
  pip() { "$source/tools/bin/python" -m pip -q "$@" >&2; }
  pip install cmake ninja
  pip download --no-deps --no-binary llama_cpp_python -d "$source" "llama_cpp_python==$version"
  tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source"
  export PATH="$source/tools/bin:$PATH"
  # shellcheck disable=SC2086  # options are words
  cmake -G Ninja -S "$source"/llama_cpp_python-*/vendor/llama.cpp -B "$source/build" -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF $options >&2
  cmake --build "$source/build" --target llama-server ${JOBS:+--parallel "$JOBS"} >&2
  cp "$source/build/bin/llama-server" "$folder/llama-server.part"
  "$folder/llama-server.part" --version >&2
  mv "$folder/llama-server.part" "$folder/llama-server"
  echo "$build" > "$folder/BUILD"
  echo "llama-server was built in $((SECONDS - started)) s" >&2
fi
echo "$folder/llama-server"
