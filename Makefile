# Everything a contributor or a newcomer types. `make` alone explains itself.
#
#   make bench PKG=immiscible-noise      one package's benchmarks
#   make bench SMOKE=1                   tiny sizes: do both sides still agree?
#   make test ARGS="-k frechet"          more words for pytest

.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first Python >= 3.11 on this machine, by its own path: uv takes a version manager's shim for another one than the
# environment was made with. uv is never asked to download one.
find_python = for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
  "$$p" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' 2>/dev/null && exit; done
PYTHON := $(shell $(find_python))
export UV_PYTHON ?= $(PYTHON)
export UV_PYTHON_DOWNLOADS ?= never
# An environment that happens to be active has no part in this; uv would say so at every command.
unexport VIRTUAL_ENV

# Wheels that this machine offers pip (a CPU build of torch, say) are offered to uv as well. Empty is fine.
pip_links := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
comma := ,
space := $(subst ,, )
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(pip_links)))

# And so is the certificate file that pip was told of, where there is one.
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

# Actively waiting OpenMP threads slow a busy machine down by an order of magnitude.
export OMP_WAIT_POLICY ?= PASSIVE

UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
RUN := $(UV) run --no-sync

PACKAGES := $(notdir $(wildcard packages/*))
PKG ?= $(PACKAGES)
ARGS ?=
# Test processes; each has one thread.
JOBS ?= auto

.PHONY: help sync demo test lint types bench integrations reliability zoo build clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "diffcore-lab needs Python 3.11 or newer on the PATH"; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --quiet --disable-pip-version-check uv

sync: $(filter .uv/%,$(UV)) ## install everything into .venv (brings uv where it is missing)
	@$(UV) sync --quiet --all-packages --all-extras

demo: sync ## the two-minute tour of each package, with pictures
	@for package in $(PKG); do $(RUN) $$package demo --out runs/demo-$$package || exit $$?; done

test: sync ## all tests
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: sync ## style, formatting and the dependency rule
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) lint-imports

types: sync ## the type checker
	@$(RUN) basedpyright

bench: sync ## speed and memory against plain references; SMOKE=1 for tiny sizes, PKG=name for one package
	@OMP_NUM_THREADS=1 $(RUN) python benchmarks/run.py $(if $(SMOKE),--smoke) $(if $(filter command,$(origin PKG)),$(PKG))

integrations: sync ## comparisons with packages that stay out of the workspace, each in an environment of its own
	@OMP_NUM_THREADS=1 $(UV) run --isolated --no-dev --package immiscible-noise --all-extras --with torchcfm \
	  python benchmarks/immiscible_torchcfm.py
	@OMP_NUM_THREADS=1 $(UV) run --isolated --no-dev --package diffusion-featsel --all-extras --with timm \
	  python benchmarks/featsel_timm.py
	@OMP_NUM_THREADS=1 $(UV) run --isolated --no-dev --package w2w-space --with lycoris-lora --with peft \
	  python benchmarks/w2w_lycoris.py

reliability: sync ## the long form of the crash, kill and fuzz tests
	@RELIABILITY=long OMP_NUM_THREADS=1 $(RUN) pytest -m reliability $(ARGS)

# In the order in which each finds what it builds on; a run that was stopped goes on.
MODELS ?= portraits-oracle portraits-sd portraits-sd-memorised portraits-sd-planted \
  digits8-classifier digits8-edm digits-styles-oracle digits-styles
SHIPPED := shared/diffcore/src/diffcore/zoo/weights
zoo: sync ## train again the small models that ship with diffcore (hours); MODELS=name for one of them
	@for model in $(MODELS); do \
	  $(RUN) diffcore zoo train $$model --out runs/zoo/$$model || [ $$? = 1 ] || exit $$?; \
	  rm -rf $(SHIPPED)/$$model && cp -r runs/zoo/$$model/model $(SHIPPED)/$$model || exit $$?; done

build: sync ## wheels and source distributions of all packages, in dist/
	@$(UV) build --quiet --all-packages && ls dist

clean: ## remove what the other targets made
	rm -rf .venv .uv dist runs uv.lock .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
