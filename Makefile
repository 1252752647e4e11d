# Set-up needs python3.11 with venv or pip, make, and the package registry; no root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
UV_VERSION := 0.13.9
BIN := .venv/bin
# Named by what it was made from: another lock is another stamp, so a second run installs nothing.
STAMP := .venv/.set-up-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
UV := .uv/uv

# A shell that forbids Python to keep what it has compiled makes each of a thousand processes compile all of it again.
unexport PYTHONDONTWRITEBYTECODE

# Three processes for what is light: a fourth gained 3 % and made tests late that have a deadline. What starts real
# Ray needs the machine for itself: two at a time gain little, and nodes that boot slower lose races with idle time.
LIGHT := -m "not long and not ray" -n 3 --dist loadfile
RAY := -m "ray and not long" -p no:xdist

.PHONY: help setup lock up down status demo demo-service test test-long coverage check format openapi docs wheel backup restore bench

help:
	@echo "make setup      .venv from requirements.lock"
	@echo "make demo       one real Ray job on this machine, from nothing to nothing"
	@echo "make demo-service   a service upgraded under load, second by second, from nothing to nothing"
	@echo "make up         the control plane in the foreground (DETACH=1: returns when it is ready)"
	@echo "make status     what runs      make down   ends clusters, then the rest"
	@echo "make backup     [FILE=path]    make restore FILE=path"
	@echo "make test       15 minutes at most        make test-long   soaks and sweeps"
	@echo "make coverage   the light tests, measured; fails below the floor in pyproject.toml; the report: .coverage-html/"
	@echo "make check      format, lint, types, import contracts, documentation      make format   mends what can be"
	@echo "make docs       the documentation as a site in site/"
	@echo "make wheel      the client's package in dist/"
	@echo "make openapi    api/openapi.json      make lock   requirements.lock      make bench   docs/benchmarks.md's numbers"

setup: $(STAMP)

.uv/ready-$(UV_VERSION):
	@echo "── uv $(UV_VERSION) into .uv/"
	@rm -rf .uv
	@if $(PYTHON) -m venv .uv >/dev/null 2>&1; then \
	  .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	  ln -s bin/uv $(UV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  rm -rf .uv; $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv/target uv==$(UV_VERSION); \
	  ln -s target/bin/uv $(UV); \
	else \
	  rm -rf .uv; echo "error: $(PYTHON) has neither venv nor pip. Install one (on Debian: python3-venv), or set PYTHON=…" >&2; exit 1; \
	fi
	@touch $@

$(STAMP): | .uv/ready-$(UV_VERSION)
	@echo "── Python environment into .venv/"
	@[ -x $(BIN)/python ] || $(UV) venv --quiet --python $(PYTHON) .venv
	@echo "── $$(grep -cE '^[a-z0-9].*==' requirements.lock) packages by requirements.lock (the first time some GB; later from uv's cache)"
	@$(UV) pip sync --compile-bytecode --python $(BIN)/python requirements.lock
	@echo "── heliostat itself, from this checkout"
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@rm -f .venv/.set-up-*
	@touch $@

lock: | .uv/ready-$(UV_VERSION)
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  pyproject.toml --group server --group aws --group gcp --group local --group dev --group docs -o requirements.lock

up: setup
	@exec $(BIN)/python -m embedded.stack up

down: setup
	@$(BIN)/python -m embedded.stack down

status: setup
	@$(BIN)/python -m embedded.stack status

demo: setup
	@exec $(BIN)/python -m embedded.stack demo

demo-service: setup
	@exec $(BIN)/python -m embedded.stack demo-service

backup: setup
	@$(BIN)/python -m embedded.stack backup $(FILE)

restore: setup
	@$(BIN)/python -m embedded.stack restore $(FILE)

test: setup
	$(BIN)/python -m tests.rerun $(LIGHT) -- $(RAY)

# What tests start as processes is measured too. Not measured: `ray` and `long` tests, so agent/ and clouds/ look worse
# than they are.
coverage: setup
	$(BIN)/pytest $(LIGHT) --cov --cov-report=term --cov-report=html

test-long: setup
	$(BIN)/pytest -m long -p no:xdist --timeout 1800

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy installation.py server.py worker.py
	$(BIN)/mypy -p tools
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: setup
	$(BIN)/python -m api.openapi

# Never with --quiet: mkdocs then counts no warning, and --strict passes whatever is broken.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: setup
	$(BIN)/python -m hatchling build -t wheel -d dist

bench: setup
	$(BIN)/python -m benchmarks
