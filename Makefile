# make demo | test | test-slow | lint | bench | bench-models | setup | clean
#
# Each target makes its own .venv with everything in it. Variables:
#   PYTHON      the interpreter (default: the first of python3, python3.13 .. python3.10 that will do)
#   TORCH_SPEC  which torch and torchvision to install
#   FASTCV_CUDA auto (CUDA part where nvcc is found), on, off

SHELL := /bin/bash
TORCH_SPEC ?= torch==2.14.1 torchvision==0.29.1
FACENET_SPEC ?= facenet-pytorch==2.6.0

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
# One stamp for the dependencies, named after what was asked for, and one for the build.
DEPENDENCIES := $(VENV)/.dependencies-$(shell echo '$(TORCH_SPEC) $(FACENET_SPEC)' | cksum | cut -d' ' -f1)
BUILT := $(VENV)/.built-$(or $(FASTCV_CUDA),auto)

.PHONY: setup demo test test-slow lint bench bench-models clean
.DEFAULT_GOAL := setup

setup: $(BUILT)

demo: $(BUILT)
	$(RUN) -m fastcv.demo

test: $(BUILT)
	$(RUN) -m pytest -m "not slow" --cov=fastcv --cov-report=term-missing:skip-covered --cov-fail-under=90

test-slow: $(BUILT)
	$(RUN) -m pytest

lint: $(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(BUILT)
	$(RUN) -m benchmarks

bench-models: $(BUILT)
	$(PIP_INSTALL) -e '.[runtimes]' --no-build-isolation
	$(RUN) -m benchmarks.models
	$(RUN) -m benchmarks.all_models
	$(RUN) -m benchmarks.memory

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info fastcv/*.so .pytest_cache .ruff_cache .benchmarks .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter will do when it is 3.10 or newer and has pip's bundle and C headers (on Debian and Ubuntu the packages
# python3-venv and python3-dev).
$(RUN):
	@set -e; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	  if $$python -c 'import ensurepip, os, sys, sysconfig, venv; \
	    header = os.path.join(sysconfig.get_path("include"), "Python.h"); \
	    sys.exit(sys.version_info < (3, 10) or not os.path.exists(header))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV); exit 0; fi; done; \
	echo "no Python >= 3.10 with venv and headers was found: install one, or name it: make PYTHON=..." >&2; exit 1

# What building needs (as in pyproject.toml), with the torch that will run it: hence no build isolation.
BUILD_REQUIRES := 'setuptools>=77' 'pybind11>=2.13' ninja 'cmake>=3.28' wheel

PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check

$(DEPENDENCIES): pyproject.toml | $(RUN)
	$(PIP_INSTALL) $(TORCH_SPEC) $(BUILD_REQUIRES) 'ruff>=0.14'
	$(PIP_INSTALL) --no-deps $(FACENET_SPEC)
	@rm -f $(VENV)/.dependencies-*
	@touch $@

$(BUILT): $(SOURCES) $(DEPENDENCIES)
	$(PIP_INSTALL) --no-warn-conflicts --no-build-isolation -e '.[dev]' # facenet-pytorch's old pins
	@rm -f $(VENV)/.built-*
	@touch $@
