# RefSeg's commands. Each works from a bare clone: what it needs is set up first, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
# An imaging library sets the C locale to "C", after which files would be opened as ASCII.
export PYTHONUTF8 := 1
.DEFAULT_GOAL := help
.PHONY: help setup test lint typecheck demo scenes audit serve clean

VENV := .venv
BIN := $(VENV)/bin
# `make setup REQUIREMENTS=requirements-gpu.txt` takes the CUDA build of faiss; remembered in the stamp
CHOSEN := $(shell cat $(VENV)/.ready 2>/dev/null)
REQUIREMENTS ?= $(or $(CHOSEN),requirements.txt)
ifneq ($(CHOSEN),$(REQUIREMENTS))
.PHONY: $(VENV)/.ready
endif
PORT ?= 8000
HOST ?= 127.0.0.1

# The newest Python that really runs here and can make environments (Debian splits `venv` off).
# Looked for only when an environment has to be made; `make PYTHON=... setup` names another one.
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3; do \
	"$$python" -c '$(USABLE)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make .venv with everything pinned (once; again when a pin changes)

$(VENV)/.ready: requirements.txt requirements-base.txt requirements-gpu.txt requirements-dev.txt requirements-distributed.txt requirements-no-deps.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
		echo "No Python 3.10, 3.11 or 3.12 with venv was found. Install one (Debian: python3-venv)"; \
		echo "or name it: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@# both builds of faiss fill the same folder: the other one has to go first
	test -z "$(CHOSEN)" || test "$(CHOSEN)" = "$(REQUIREMENTS)" || \
		$(BIN)/python -m pip uninstall --yes faiss-cpu faiss-gpu
	$(BIN)/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS) -r requirements-dev.txt
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --disable-pip-version-check \
		--no-deps --no-build-isolation -r requirements-no-deps.txt
	@echo "$(REQUIREMENTS)" > $@

lint: setup ## style and the rule that imports go down only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: setup ## mypy
	$(BIN)/mypy

test: setup lint typecheck ## set up, then style, types, import rules and tests
	@# two processes, a module in one of them; a thread each, or four would share two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

$(VENV)/.demo: requirements-demo.txt $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --only-binary=:all: -r requirements-demo.txt
	@touch $@

demo: $(VENV)/.demo ## set up, then play an annotator against a real server; pictures in build/demo
	$(BIN)/python -m demo

ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

scenes: setup ## RefSeg at a real PACS (Orthanc) and in OHIF in a browser; installs them; pictures in build/scenes
	@mkdir -p build/scenes/node; missing=""; \
	test -f /usr/share/orthanc/plugins/libOrthancDicomWeb.so || missing="orthanc orthanc-dicomweb"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v npm >/dev/null || missing="$$missing nodejs npm"; \
	test -z "$$missing" || { $(ROOT) apt-get update && $(ROOT) apt-get install -y --no-install-recommends $$missing; }
	@test -d build/scenes/node/node_modules/playwright-core || \
		npm install --prefix build/scenes/node --no-audit --no-fund playwright-core@1.65.1
	$(BIN)/python -m pytest tests/apps/test_orthanc.py
	$(BIN)/python -m scenes

audit: setup ## known weaknesses of what is installed (pip-audit asks pypi.org or, with AUDIT="-s osv", osv.dev)
	test -x build/audit/bin/pip-audit || { $(BIN)/python -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1; }
	build/audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(AUDIT)

serve: setup ## start the server: make serve STUDIES=DIR [PORT=8000] [HOST=127.0.0.1] [TOKEN_FILE=FILE] [OPTIONS="--tls-cert ..."]
	@test -n "$(STUDIES)" || { echo "Which images? make serve STUDIES=DIR"; exit 2; }
	$(BIN)/python apps/refseg/main.py serve --studies "$(STUDIES)" --host "$(HOST)" --port "$(PORT)" \
		$(if $(TOKEN_FILE),--token-file "$(TOKEN_FILE)") $(OPTIONS)

clean: ## remove what the checks and the demo made (not .venv)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
