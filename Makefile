# Paths stay relative and `python -m` is used throughout: both work where the checkout's own path
# has a space in it, which make's variables and the first lines of scripts in .venv/bin do not.
SHELL := /bin/bash
VENV_PYTHON := .venv/bin/python
RECIPE ?= recipes/tiny_cpu.py:r2vpo_off_policy
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format bench chaos clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv from requirements/cpu-lock.txt, unless it is up to date
	@bash tools/setup_env.sh

quickstart: setup  ## train the tiny model on this machine's CPU (RECIPE=..., ARGS="--train.seed 1")
	@$(VENV_PYTHON) -m r2vpo_megatron.cli.train $(RECIPE) $(ARGS)

test: setup  ## run the tests, without the slow ones (ARGS="-k name")
	@$(VENV_PYTHON) -m pytest -m "not slow" $(ARGS)

test-all: setup  ## run all tests
	@$(VENV_PYTHON) -m pytest $(ARGS)

lint: setup  ## ruff, mypy, import contracts and file lengths
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) -c "from importlinter.cli import lint_imports_command as main; main()"
	@bash tools/check_file_lengths.sh

format: setup  ## format the code and fix what ruff can
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

bench: setup  ## run every benchmark in benchmarks/, each printing a table
	@for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; PYTHONPATH=. $(VENV_PYTHON) "$$script" $(ARGS) || exit; \
	done

chaos: setup  ## bring about every fault of docs/reliability.md and write its table (ARGS="kill-driver")
	@$(VENV_PYTHON) -m tests.end_to_end.faults --write docs/reliability.md $(ARGS)

clean:  ## remove caches and build products; .venv and outputs/ stay
	@rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@rm -rf r2vpo_megatron.egg-info
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
