# `make ablation` and `make test` each do all their set-up on a machine with Python 3.11+ and make.
PYTHON ?= python3
# Colab has Python 3.13; an older one will do.
PYTHON_COLAB ?= $(shell for python in python3.13 python3.12 python3; do \
  $$python -c pass 2> /dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: ablation accelerator accelerator-all accelerator-quick docs test test-slow test-colab fuzz lint notebooks clean
.DELETE_ON_ERROR:

# Two processes share the runs, because a model this small keeps no more than one core busy. The last
# command prints the table, and trains what an interrupted process has left.
ablation: .venv/core
	$(BIN)/python -m experiments.run sparsity_vs_accuracy > /dev/null 2>&1 & \
	$(BIN)/python -m experiments.run sparsity_vs_accuracy > /dev/null; wait
	$(BIN)/python -m experiments.run sparsity_vs_accuracy

# Measures the GPU that is there in some four minutes; accelerator-all adds every method and whole
# runs, and accelerator-quick shows in two minutes on a CPU that all of it runs.
accelerator: .venv/core
	$(BIN)/python -m experiments.run accelerator

accelerator-all: .venv/core
	$(BIN)/python -m experiments.run accelerator
	$(BIN)/python -m experiments.run accelerator_all

accelerator-quick: .venv/core
	$(BIN)/python -m experiments.run accelerator_quick

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not fuzz and not notebook'

# What takes too long for every run of the tests: guides, a step of every config, steps without jit,
# and inputs of many megabytes.
test-slow: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# 500 random configs and 300 damaged files; a failure names the command that repeats it.
fuzz: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m fuzz tests/fuzz

# The notebooks and the contract of the methods with the versions that Colab has. What is slow in the
# contract is tested with the newest versions alone.
test-colab: .venv-colab/dev
	.venv-colab/bin/python -m pytest -n 2 --dist loadfile -o cache_dir=.venv-colab/pytest -m 'not slow' \
	  tests/colab tests/test_contract.py tests/test_flops_contract.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site, from an empty folder; a warning is an error.
docs: .venv/dev
	rm -rf build/docs docs/reference/generated
	$(BIN)/python -m sphinx --builder html --jobs auto --fail-on-warning --quiet docs build/docs

notebooks: .venv/dev
	$(BIN)/python tests/colab/execute.py

clean:
	rm -rf .venv .venv-colab build *.egg-info

.venv/core: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,docs,notebook]'
	touch $@

# What is there before a notebook starts, then what its first cell installs.
.venv-colab/core: colab/preinstalled.txt colab/install.sh requirements.txt
	rm -rf .venv-colab
	$(PYTHON_COLAB) -m venv .venv-colab
	.venv-colab/bin/pip install --quiet --disable-pip-version-check -r colab/preinstalled.txt
	PATH="$$PWD/.venv-colab/bin:$$PATH" sh colab/install.sh
	touch $@

# What tests need besides.
.venv-colab/dev: .venv-colab/core pyproject.toml
	.venv-colab/bin/pip install --quiet --disable-pip-version-check -c colab/preinstalled.txt \
	  -e '.[dev,notebook]'
	touch $@
