# Everything a newcomer needs: `make quickstart`, `make test`. Everything CI runs: `make lint`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One release below the next that would pull gigabytes of CUDA; a range alone would take the newest.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint format clean

help:  ## show what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.base: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.base  ## install and play a backdoored federation (under 2 minutes on 2 cores)
	$(BIN)/fedsim run configs/quickstart.yaml

test: $(VENV)/.test  ## the whole test suite
	$(BIN)/python -m pytest

test-fast: $(VENV)/.test  ## the tests that take moments
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.dev  ## format, rules, types, floors, wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_wheel.py

format: $(VENV)/.dev  ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was built (not the runs)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
