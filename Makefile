# Both commands a user needs are `make demo` and `make test`; neither needs the environment activated.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0

.PHONY: demo test test-model test-slow test-all lint types contracts docs clean

demo: .venv/installed
	$(BIN)/eckart demo

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# with the built-in model, which comes inside a registry package
test-model: .venv/dev
	$(BIN)/python -m pytest -q -m "model and not slow"

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -m slow

test-all: test test-model test-slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

contracts: .venv/dev
	$(BIN)/lint-imports

docs: .venv/dev
	$(BIN)/pip install --quiet --group docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site demo

# torch first and by itself: later packages accept the build that is there
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import sys; assert sys.version_info >= (3, 11), 'eckart needs Python 3.11 or newer'"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --upgrade "pip>=25.1"
	$(BIN)/pip install --group dev
	touch $@
