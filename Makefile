# orderstream.  Every target works as the first command in a fresh clone: what it needs is set up on the way.
#
#   ARGS=…      more arguments for the command behind run, test, up, down, model and bench: make test ARGS="tests/unit -x"
#   KEEP=1      make run: leave the worker and the ingress running
#   SCENARIO=…  make bench: which one
#   MINUTES=…   make chaos: how long (10 by default)
#   SEED=…      make chaos: the faults of an earlier run again; drawn by default
#   PROCESSES=… make test without ARGS: processes of pytest, each with engines of its own (2)
#   PYTHON=…    the Python that .venv is made with (3.11 to 3.13)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: run test chaos up down check model bench screenshots lock help

PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
# Newer than its inputs when .venv holds what they name.
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv/.bench-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
UV := .local/uv/bin/uv

run: $(INSTALLED)  ## run it all: engines, a worker, the ingress, real orders, a flash sale, verify (KEEP=1: keep it up)
	$(BIN)/orderstream demo $(if $(filter-out 0,$(KEEP)),--keep) $(ARGS)

test: $(INSTALLED)  ## run all tests on engines of their own (ARGS="tests/unit -x": pytest's arguments instead)
	$(BIN)/python -m pytest $(or $(ARGS),-n $(PROCESSES) --dist worksteal)

chaos: $(INSTALLED)  ## break everything at random, on engines of its own, and check every promise (MINUTES=10 SEED=…)
	CHAOS_MINUTES=$(or $(MINUTES),10) CHAOS_SEED=$(or $(SEED),$(shell echo $$$$)) \
	  $(BIN)/python -m pytest -s tests/chaos/test_monkey.py $(ARGS)

up: $(INSTALLED)  ## start Kafka, Redis and Postgres under .local/, or say where they run
	$(BIN)/orderstream up $(ARGS)

down: $(INSTALLED)  ## stop the engines that `make up` or `make run` started; their data stays
	$(BIN)/orderstream down $(ARGS)

check: $(INSTALLED)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

model: $(INSTALLED)  ## check the model of the order protocol, every configuration (QUICK=1: those of a few seconds)
	$(BIN)/python -m docs.model $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

bench: $(INSTALLED) $(BENCH_INSTALLED)  ## measure (SCENARIO=…; without: all of them)
	$(BIN)/orderstream bench $(SCENARIO) $(ARGS)

screenshots: $(INSTALLED)  ## take the pictures of the docs again, while the orders of data/ flow
	$(BIN)/python -m tests.screenshots

lock: $(UV)  ## pin the newest dependencies that pyproject.toml allows, with hashes
	$(UV) pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  pyproject.toml -o requirements.lock
	$(UV) pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --constraint requirements.lock --extra dev pyproject.toml -o requirements-dev.lock
	$(UV) pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --constraint requirements-dev.lock --extra bench pyproject.toml -o requirements-bench.lock
	@! grep -nE '://|$(CURDIR)' requirements.lock requirements-dev.lock requirements-bench.lock

help:  ## explain the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(UV):
	$(PYTHON) -m venv .local/uv
	.local/uv/bin/python -m pip install -q --disable-pip-version-check uv

$(INSTALLED): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo 'orderstream needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'installing with apt-get: python3-venv'; \
	    apt-get update -q >/dev/null && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv >/dev/null; \
	  else \
	    echo "Python's venv module is missing: install the package python3-venv" >&2; exit 1; \
	  fi
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo 'installing the locked dependencies into .venv'
	@$(PIP) install -q --require-hashes -r requirements-dev.lock
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(BENCH_INSTALLED): requirements-bench.lock $(INSTALLED)
	@echo 'installing what the benchmark compares with into .venv'
	@$(PIP) install -q --require-hashes -r requirements-bench.lock
	@touch $@
