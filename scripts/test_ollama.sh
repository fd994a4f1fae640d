#!/usr/bin/env bash
# Run the tests of the deployment to Ollama against a real server, to find out whether the contract server is right.
#
#   scripts/test_ollama.sh [URL]   default: http://127.0.0.1:11434
#
# They upload two small models (10 MB together) under names that begin with finetune-test-, and remove them again.
set -euo pipefail
cd "$(dirname "$0")/.."

export FINETUNE_TEST_OLLAMA_URL=${1:-http://127.0.0.1:11434}
curl -fsS "$FINETUNE_TEST_OLLAMA_URL/api/version" ||
  { echo "no Ollama answers at $FINETUNE_TEST_OLLAMA_URL; start one with \`ollama serve\`, or give its URL" >&2; exit 1; }
echo
exec .venv/bin/python -m pytest -m servers finetune_pipeline_tests/deployment/test_ollama.py -v
