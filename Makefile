# `make demo` and `make test` are all a newcomer needs; both work on a fresh machine with
# Python 3.11 to 3.13, a C++17 compiler and cmake.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What Linux without a GPU gets, as its CPU build, so that no CUDA packages are pulled.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test install lint types check soak soak-serve docs clean

demo: $(VENV)/.installed
	$(BIN)/hasten run --workload code --limit 8 --max-tokens 64 --show

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/pytest

soak: $(VENV)/.installed-dev
	HASTEN_EXAMPLES=200 $(BIN)/pytest -s tests/engine/test_randomized.py
	$(BIN)/pytest -s -m soak tests/engine/test_randomized.py --timeout 7200
	$(BIN)/pytest -s -m soak tests/speculation --timeout 7200

# Some 50 minutes: storms, fuzzing and streams at full size, overload, and half an hour of load.
soak-serve: $(VENV)/.installed-dev
	$(BIN)/pytest -s -m soak tests/serving --timeout 7200
	$(BIN)/python benchmarks/serve_overload.py --out benchmarks/serve-overload
	$(BIN)/python benchmarks/serve_soak.py --out benchmarks/serve-soak

docs: $(VENV)/.installed
	$(BIN)/python -m hasten.method_tables

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "$(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: anything that depends on it would otherwise pull the default build, which on Linux
# is one for CUDA. That is right for a machine with an NVIDIA GPU. An installed torch is kept.
$(VENV)/.torch: | $(VENV)/bin/python
	@if $(BIN)/python -c "import torch" 2>/dev/null; then :; \
	elif [ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q "torch>=2.6,<3"; \
	else $(BIN)/pip install -q --retries 1 --timeout 10 --extra-index-url $(TORCH_CPU_INDEX) \
	  "$(TORCH)+cpu" || { echo "cannot install $(TORCH)+cpu: install a CPU build of torch 2.6 or" \
	  "newer into $(VENV) by hand, then run make again" >&2; exit 1; }; fi
	@touch $@

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q "scikit-build-core>=0.10" "nanobind>=2.4" ninja
	$(BIN)/pip install -q --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf build $(VENV)
