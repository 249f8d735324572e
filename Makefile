# Everyday commands. `make demo` and `make test` work from a fresh clone; `make env` builds what they need into .venv.

PYTHON ?= python3
ARGS ?=
# ON builds the CUDA kernels into the package, which takes nvcc and some minutes.
HALFBYTE_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),ON,OFF)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check
# cmake and ninja come from the lock file; paths stay relative so that a checkout under "my code/" works.
WITH_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

DEPENDENCIES := $(VENV)/.dependencies
TOOLS := $(VENV)/.tools
PACKAGE := $(VENV)/.package
# .git/logs/HEAD: the package reports the commit it was built from.
SOURCES := pyproject.toml CMakeLists.txt tools/flatten_metal.py $(wildcard .git/logs/HEAD) \
  $(shell find cmake include src python -type f -not -path '*/__pycache__/*' 2>/dev/null)
CPP_FILES = $(shell find include src python tests/cpp tests/gpu tests/cuda bench -name '*.cpp' -o -name '*.h' -o -name '*.hpp' 2>/dev/null)

.PHONY: env demo test counts counts-update bench results format lint clean release sanitize asan ubsan tsan neon metal cuda
.NOTPARALLEL:
.DEFAULT_GOAL := env

env: $(PACKAGE)

$(DEPENDENCIES): requirements.lock
	@PYTHON="$(PYTHON)" tools/check_system.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements.lock (the largest is PyTorch) ..."
	@$(PIP) -r requirements.lock
	@touch $@

$(PACKAGE): $(DEPENDENCIES) $(SOURCES)
	@echo "building halfbyte ..."
	@$(WITH_VENV) $(PIP) --no-build-isolation --no-deps -C cmake.define.HALFBYTE_CUDA=$(HALFBYTE_CUDA) .
	@touch $@

$(TOOLS): $(DEPENDENCIES) requirements-dev.lock
	@$(PIP) -r requirements-dev.lock
	@touch $@

demo: env
	@$(BIN)/halfbyte demo $(ARGS)

# The last line printed is pytest's.
test: release metal cuda sanitize $(if $(filter x86_64,$(shell uname -m)),neon) env
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

# C++ tests, one build folder a preset. metal, the checks of the Metal text, and cuda, the CUDA kernels without a GPU,
# share that of release.
release metal cuda sanitize asan ubsan tsan neon: $(DEPENDENCIES)
	@PYTHON="$(PYTHON)" tools/check_system.sh --tests
	@$(if $(filter metal neon,$@),PYTHON="$(PYTHON)" tools/check_system.sh --$@)
	@$(WITH_VENV) cmake --preset $(if $(filter metal cuda,$@),release,$@) >/dev/null
	@$(WITH_VENV) cmake --build --preset $@ -- --quiet
	@$(WITH_VENV) ctest --preset $@

# Instructions of each kernel against tests/counts.json; counts-update records them anew.
counts counts-update: $(DEPENDENCIES)
	@PYTHON="$(PYTHON)" tools/check_system.sh --tests
	@$(WITH_VENV) cmake --preset release >/dev/null
	@$(WITH_VENV) cmake --build --preset release --target halfbyte_counts -- --quiet
	@tools/check_counts.py build/release/halfbyte_counts "$$(sed -n 's/^CMAKE_CXX_COMPILER:.*=//p' build/release/CMakeCache.txt)" \
	  $(if $(findstring update,$@),--update)

bench: env
	@PYTHON="$(PYTHON)" tools/check_system.sh --bench
	@$(WITH_VENV) cmake --preset bench >/dev/null
	@$(WITH_VENV) cmake --build --preset bench -- --quiet
	build/bench/halfbyte_bench --benchmark_out=build/bench/kernels.json --benchmark_out_format=json
	$(BIN)/halfbyte bench attend --json build/bench/attend.json
	$(BIN)/halfbyte bench encode --json build/bench/encode.json
	$(BIN)/halfbyte bench generate --json build/bench/generate.json
	$(BIN)/halfbyte bench roofline --json build/bench/roofline.json --plot build/bench/roofline.png
	$(BIN)/halfbyte bench glue --json build/bench/glue.json

# The files and tables of docs/results/cpu.md, from this machine: about five minutes, and it must be idle.
results: env
	tools/measure_cpu.sh

format: $(TOOLS)
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff format python tests tools
	$(BIN)/ruff check --fix python tests tools

lint: $(TOOLS)
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/ruff format --check python tests tools
	$(BIN)/ruff check python tests tools
	@$(WITH_VENV) cmake --preset release >/dev/null
	$(BIN)/clang-tidy --quiet -p build/release $(wildcard src/*.cpp)

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
