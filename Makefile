# Each target makes .venv first when it is missing or older than what describes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

# Nothing here may reach a model hub.
export HF_HUB_OFFLINE := 1

# As `source .venv/bin/activate` would: torch looks for ninja on PATH when DeepSpeed compiles an operator.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"
# One thread per pytest process: launcher tests start two ranks each, on as few as two cores.
PYTEST := $(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile

.PHONY: help demo test test-quick test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        prepare scenes, train with DeepSpeed, evaluate, draw pictures"
	@echo "make test        all tests but the slow ones (minutes)"
	@echo "make test-quick  tests that start no launcher (3 minutes)"
	@echo "make test-slow   the slow tests (an hour)"
	@echo "make lint        ruff format, ruff check, pyright"
	@echo "make clean       remove caches and build output; .venv, runs/ and data/ stay"
	@echo "Settings: PYTHON=$(PYTHON) JOBS=$(JOBS)"

demo: $(STAMP)
	$(IN_VENV) simla demo

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-quick: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not launcher"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu" --timeout 3600

lint: $(STAMP)
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .
	$(IN_VENV) pyright

# The stamp is written last: an interrupted install starts over at the next make.
$(STAMP): setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or set PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: set PYTHON=python3.11 or newer"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 2; }
	@command -v g++ >/dev/null || { echo "g++ not found, and DeepSpeed and Triton compile at first use: apt-get install g++"; exit 2; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null || { echo "Python.h not found, and DeepSpeed and Triton compile against it: apt-get install python3-dev"; exit 2; }
	@rm -f $@
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): about 6 GB, a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,dev,demo,data]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find simla_ds kernels launch benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
