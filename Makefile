# `make ablation` and `make test` each do all their set-up on a machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: ablation test test-slow lint notebooks clean
.DELETE_ON_ERROR:

ablation: .venv/core
	$(BIN)/python -m experiments.run sparsity_vs_accuracy

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# What takes too long for every run of the tests: fuzzing, and inputs of many megabytes.
test-slow: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist load -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: .venv/dev
	$(BIN)/jupytext --to ipynb colab/*.py

clean:
	rm -rf .venv build *.egg-info

.venv/core: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,notebook]'
	touch $@
