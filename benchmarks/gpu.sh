#!/usr/bin/env bash
# Training on a GPU: SFT of Llama-shaped models of 1B and 8B (random weights, made on the spot), LoRA and QLoRA, by the
# backend peft and, where it is installed, by unsloth. Prints tokens per second, memory, and the fraction of the measured
# matrix-multiply peak. Without a GPU it trains a tiny shape on the CPU and says that the GPU part was not run.
#
#   bash benchmarks/gpu.sh [--shapes tiny 1b 8b] [--steps 30]
#
# Needs the repository and its environment, nothing from the network; about 20 GB of disk for the 8B model.
#   PYTHON   the environment's Python; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m benchmarks.gpu "$@"
