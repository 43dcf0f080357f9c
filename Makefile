# make demo | test | test-emulated | test-slow | test-gpu | lint | bench | bench-gpu | bench-models | setup | clean
#
# Each target makes its own .venv with everything in it. Variables:
#   PYTHON      the interpreter (default: the first of python3, python3.13 .. python3.10 that will do)
#   TORCH_SPEC  which torch and torchvision to install
#   FASTCV_CUDA auto (CUDA part where nvcc is found), on, off
#   GPU_PYTHON  of test-gpu and bench-gpu: an interpreter that has torch, pytest, cmake, ninja and pybind11 (default: python3)

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

.PHONY: setup demo test test-emulated test-slow test-gpu lint bench bench-gpu bench-models clean
.DEFAULT_GOAL := setup

setup: $(BUILT)

demo: $(BUILT)
	$(RUN) -m fastcv.demo

test: $(BUILT)
	$(RUN) -m pytest -m "not slow and not emulated" --cov=fastcv --cov-report=term-missing:skip-covered --cov-fail-under=90

# Kernels for GPUs, without one: CUDA's compiled for the host, Triton's in its interpreter and ahead of time.
test-emulated: $(BUILT)
	$(RUN) -m pytest -m "emulated and not slow" -n 2

test-slow: $(BUILT)
	$(RUN) -m pytest

# On a machine with a GPU, with what $(GPU_PYTHON) has: nothing is installed, and no network is needed.
GPU_PYTHON ?= python3
GPU_BUILD := build/gpu
# Compiling what is in Triton takes longest: in several processes, where pytest-xdist is there.
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
GPU_TESTS = PYTHONPATH=.:tests $(GPU_PYTHON) -m pytest -p no:cacheprovider -p backends.gpu -o addopts= -q $(GPU_WORKERS) \
  -k "$$(PYTHONPATH=tests $(GPU_PYTHON) -c 'import conftest; print(conftest.DEVICE_TESTS)')"
SANITIZER := compute-sanitizer --error-exitcode 1 --target-processes all

$(GPU_BUILD)/.built: $(SOURCES)
	cmake -S . -B $(GPU_BUILD) -G Ninja -DFASTCV_CUDA=on -DFASTCV_OUTPUT_DIR=$(CURDIR)/fastcv \
	  -DFASTCV_TORCH_DIR=$$($(GPU_PYTHON) -c 'import torch, os; print(os.path.dirname(torch.__file__))') \
	  -DPython_EXECUTABLE=$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)') \
	  -Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir) \
	  -DFASTCV_CUDA_ARCHITECTURES=$$($(GPU_PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
	cmake --build $(GPU_BUILD)
	@touch $@

test-gpu: $(GPU_BUILD)/.built
	$(GPU_PYTHON) -m fastcv info
	$(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/test_gpu.py
	$(GPU_TESTS) tests/ops
	FASTCV_TEST_TRITON=1 $(GPU_TESTS) tests/ops
	$(SANITIZER) --tool memcheck $(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/test_gpu.py -k "never_waits or stream"
	$(SANITIZER) --tool racecheck $(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/test_gpu.py -k "never_waits or stream"

bench-gpu: $(GPU_BUILD)/.built
	FASTCV_TRITON=all $(GPU_PYTHON) -m benchmarks --device cuda
	FASTCV_TRITON=plan FASTCV_CACHE=build/plan $(GPU_PYTHON) -m benchmarks --device cuda

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
