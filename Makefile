# `make demo` runs the main job on a real model; `make test` passes the tests. Both set everything up in .venv.

PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?= 5.24.0
OLDER_TRANSFORMERS := 5.22.2

# Torch first and pinned: a looser requirement may fetch another build, with gigabytes of CUDA packages.
TORCH := torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(TRANSFORMERS)

.PHONY: demo test lint docs test-older clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python examples/smollm2.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into docs/_build/html. A warning is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# What touches Transformers, on the oldest version that is supported.
test-older:
	$(MAKE) VENV=$(VENV)-older TRANSFORMERS=$(OLDER_TRANSFORMERS) $(VENV)-older/.ready-$(OLDER_TRANSFORMERS)
	$(VENV)-older/bin/python examples/smollm2.py
	OMP_NUM_THREADS=1 $(VENV)-older/bin/python -m pytest -n logical -m transformers

$(VENV)/.ready-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[transformers]' 'transformers==$*' --group dev
	touch $@

clean:
	rm -rf docs/_build $(VENV) $(VENV)-older .mypy_cache .pytest_cache .ruff_cache .hypothesis
