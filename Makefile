# Two commands for users: `make demo` and `make test`. Both work in a virtual environment of their
# own (.venv) and need nothing but Python 3.10-3.13.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := models/tiny-orthrus-stdlib
# One exact version: an open range can download gigabytes of CUDA libraries that tests never use.
TORCH ?= torch==2.13.0

.PHONY: demo test lint test-long clean

demo: $(BIN)/python
	$(BIN)/python -m pip install --quiet .
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/python -m pip install --quiet '.[cuda]'; fi
	$(BIN)/orthrus-convert $(DEMO) tiny-orthrus.gguf --overwrite
	$(BIN)/orthrus-run tiny-orthrus.gguf -p 'def read(self, size=-1):\n' -n 120 --temp 0 --strategy two-pass

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m 'not gpu and not slow'

test-long: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m 'not gpu'

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) tiny-orthrus.gguf

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.test-installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
