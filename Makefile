# make demo    set up, run the whole loop on the sample logs, show what came out
# make test    set up, run the tests
# make ui      Dagster's UI on this project
# make serve   the gateway: OpenAI's API over the promoted models
# make check   what CI runs: formatter, linter, types, definitions, tests
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all ui serve check lint format bench doctor clean

export FINETUNE_HOME ?= $(CURDIR)/data/state
export DAGSTER_HOME ?= $(FINETUNE_HOME)/dagster
BIN := .venv/bin
READY := .venv/.ready

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

setup:  # always runs: CMAKE_ARGS may have changed since the last time
	@scripts/setup.sh
	@touch $(READY)

demo: $(READY)
	@$(BIN)/finetune demo

test: $(READY)
	@$(BIN)/pytest -n auto --dist loadfile -m "not slow"

test-all: $(READY)
	@$(BIN)/pytest -n auto --dist loadfile

ui: $(READY)
	@$(BIN)/finetune ui

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
