# Everything a newcomer types. Needed beforehand: Python 3.11 or later, git, make.
# Another Python: make setup PYTHON=/path/to/python3.11

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PEERS := $(VENV)/.bench
# torch.compile on a CPU needs a C++ compiler; taken from Debian where this is root there.
GET_GXX := { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get install -y -qq g++ >/dev/null 2>&1 || \
	{ apt-get update -qq && apt-get install -y -qq g++; } >/dev/null 2>&1; }; }

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s%s\n", $$1, $$2}' Makefile

setup: $(READY) ## build .venv with everything, once

# torch comes first and at its pinned version: an open range takes the newest build, on Linux one with gigabytes of
# CUDA. Where there is no GPU, a CPU build of the same version (2.13.0+cpu) is much smaller; pip prefers it where its
# own configuration shows it one (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
# The project is built with the pinned setuptools (no isolation), so nothing unpinned is fetched.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		f"$(PYTHON) is Python {sys.version.split()[0]}, but raypipe needs 3.11 or later; give one: make setup PYTHON=python3.11")'
	@echo "Setting up $(VENV); the first time takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch==2.13.0
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,hf]'
	@command -v g++ >/dev/null || $(GET_GXX) || echo "There is no g++, so the tests of compile=True will be skipped."
	@touch $(READY)

demo: setup ## train a byte-level GPT over four stages
	@$(RUN) examples/train_gpt.py

test: setup ## the fast tests
	@$(RUN) -m pytest -m "not slow and not gpu"

# pytest ends with 5 where it found no test to run; that is no failure here.
test-slow: setup ## chaos, kills and long runs
	@$(RUN) -m pytest -m "slow and not gpu" || [ $$? -eq 5 ]

check: setup ## lint, format, types, stray white space
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@! git grep --untracked -nIE '[[:blank:]]+$$|^(<<<<<<<|>>>>>>>) ' || \
		{ echo 'the lines above end in white space or are conflict markers; clean them'; exit 1; }

# DeepSpeed comes as source; nothing of it is compiled.
$(PEERS): $(READY)
	@DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	@touch $(PEERS)

bench: $(PEERS) ## the benchmarks
	@$(RUN) -m benchmarks
