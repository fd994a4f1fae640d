#!/usr/bin/env bash
# Create an environment with Axolotl for a CPU, sufficient to check our configurations against its schema and to train a
# tiny model. For the tests only: on a machine with a GPU, install Axolotl as its documentation describes.
#
#   scripts/axolotl_env.sh [FOLDER]   default: $FINETUNE_HOME/axolotl or data/state/axolotl; created once, then reused
#
#   PYTHON, TORCH_INDEX_URL           as for scripts/setup.sh
#
# Prints the path of the `axolotl` command. scripts/axolotl_env.txt pins the packages.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-${FINETUNE_HOME:-data/state}/axolotl}
pins=scripts/axolotl_env.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9
if ! cmp -s "$pins" "$folder/made-from.txt"; then
  started=$SECONDS
  rm -rf "$folder/venv"
  "${PYTHON:-python3.11}" -m venv "$folder/venv"
  pip() { "$folder/venv/bin/python" -m pip install -q "$@" >&2; }
  pip ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' $pins)"
  # Without dependencies: the file lists everything for a CPU, and Axolotl would install gigabytes of CUDA in addition.
  pip --no-deps -r $pins
  cp $pins "$folder/made-from.txt"
  echo "Axolotl's environment was created in $((SECONDS - started)) s" >&2
fi
echo "$(cd "$folder" && pwd)/venv/bin/axolotl"
