# Shortcuts for what README.md and CONTRIBUTING.md write out in full. Each sets up .venv first if it has to.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: image test lint format ci clean

image: .venv/installed
	$(BIN)/sdxl generate "a red guitar"

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ci:
	.ci/run

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch $@
