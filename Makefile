# What there is to do here: `make` lists it. Everything runs in .venv, which is made when first needed.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
# Tried when python3 is too old; never when PYTHON was given.
OTHERS := $(if $(filter file default,$(origin PYTHON)),python3.13 python3.12 python3.11 python3.14)
MODEL ?= smollm2-135m
EDITS ?= 20
# Test processes: one per core, four at most. Each computes with one thread, so that results do not depend on it.
WORKERS ?= logical

BIN := .venv/bin
PROJECTS := $(sort $(wildcard packages/*/pyproject.toml))
PACKAGES := $(patsubst %/pyproject.toml,%,$(PROJECTS))
CHECKED := $(wildcard packages/*/src) tools

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# No test reaches a hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: help install demo bench test lint wheels clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

install: .venv/.tools ## Make .venv and install the packages and the tools into it

demo: .venv/.installed ## Write 40 facts into the default model and measure what became of it
	$(BIN)/editctl run --model $(MODEL) --editor emmet --plugin replay --edits 40 --batch-size 10

bench: .venv/.tools ## Measure what an edit costs against the plain way of doing it (EDITS=20 of them)
	@$(BIN)/editctl models pull $(MODEL) >/dev/null
	$(BIN)/python tools/bench.py --model $(MODEL) --edits $(EDITS) --json bench.json

lint: .venv/.tools ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict $(CHECKED)
	$(BIN)/lint-imports --no-logo

test: lint ## Check everything: lint, then all tests, those with the real model included
	@{ $(BIN)/editctl models pull $(MODEL) --gguf && $(BIN)/editctl models pull $(MODEL); } >/dev/null || \
	    echo "Without $(MODEL), the tests that need it are skipped."
	$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --hypothesis-profile ci

wheels: .venv/.tools ## Build a wheel of every package into dist/
	@$(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir dist $(PACKAGES)
	@ls dist/*.whl

clean: ## Remove caches and wheels; .venv, runs and models stay
	rm -rf dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find packages tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(PROJECTS) constraints.txt
	@found=; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHON) $(OTHERS); do \
	        if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            found=$$python; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "$(PYTHON) is not a Python 3.11 or newer with venv and pip ($$($(PYTHON) --version 2>&1 | head -n 1))." >&2; \
	        echo "Install one (on Debian and Ubuntu: python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    if [ "$$found" != "$(PYTHON)" ]; then echo "$(PYTHON) is too old or has no venv; using $$found."; fi; \
	    "$$found" -m venv .venv || exit; \
	fi
	@echo "Installing editcore and its plugins into .venv (the first time takes a few minutes) ..."
	@$(BIN)/python -m pip install -qq -c constraints.txt $(addprefix -e ,$(PACKAGES))
	@touch $@

.venv/.tools: .venv/.installed requirements.txt
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@touch $@
