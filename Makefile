# SPDX-License-Identifier: Apache-2.0
# `make demo` edits a picture, `make test` passes the tests. All targets make .venv first; nothing outside it is changed.
# `make test-fast`: the tests but those marked slow; `make test-full`: all combinations (tests/combinations.py).
# `make lint`, `make docs`: what they check is in pyproject.toml, mkdocs.yml.

PYTHON ?= python3
# Installed where PYTHON has no torch of its own; a torch that is there (a CUDA one, say) is used as it is.
TORCH ?= torch==2.13.0
OUT ?= demo
# Test processes. One where there is a GPU: tests look at its memory and its launches.
JOBS ?= $(if $(wildcard /dev/nvidia0),1,2)

VENV := .venv
BIN := $(VENV)/bin
ASSETS := specedit_kernels/assets

.PHONY: demo test test-fast test-full ruff lint docs clean

demo: $(VENV)/installed
	mkdir -p $(OUT)
	$(BIN)/specedit edit $(ASSETS)/example.png "$$(cat $(ASSETS)/example.txt)" -o $(OUT)/edited.png

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-full: export SPECEDIT_TEST_ALL = 1
test-full: test

ruff: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: ruff
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

# an extra of pyproject.toml, on top of the rest
$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch; print('--system-site-packages')" 2>/dev/null) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=70.1" ninja pybind11
	$(BIN)/pip install -q --no-build-isolation -e ".[triton,pipelines,test]"
	touch $@

clean:
	rm -rf $(VENV) build specedit_kernels.egg-info $(OUT)
