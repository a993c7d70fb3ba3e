# What people and CI run. `make` alone lists it.

PYTHON ?= python3

PINS := requirements/dev.txt
FIRST := $(shell grep -E '^(setuptools|torch)==' $(PINS))
MADE := .venv/.made
PEER_PINS := requirements/peers.txt
PEERS_MADE := .venv-peers/.made
SOURCES := llm_dist launcher benchmarks tests docs

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-kill test-slurm check bench peers test-gpu bench-gpu cuda

help: ## list what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(MADE) ## the environment in .venv/ (every other target makes it when it is missing; PYTHON=python3.12 chooses)

# torch goes in before the rest, so that deepspeed is built against the pinned one and nothing brings another.
$(MADE): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is not a Python of at least 3.11; name one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "making .venv/ (a few minutes, once)"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install $(FIRST)
	.venv/bin/pip install --no-build-isolation -r $(PINS)
	.venv/bin/pip install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(MADE) ## raw text to a trained, resumed, evaluated model on 2 ranks; TEXT=path takes your own files
	.venv/bin/python -m launcher.demo $(if $(TEXT),--text "$(TEXT)")

test: $(MADE) ## the CPU tests; ARGS="-k tokenizer" goes to pytest
	.venv/bin/pytest -n 2 --dist loadgroup -m "not gpu and not kill and not slurm" $(ARGS)

test-kill: $(MADE) ## kill real runs at random and compare their ends; N=60 kills (24), SEED=7 (0)
	KILLS=$(or $(N),24) KILL_SEED=$(or $(SEED),0) .venv/bin/pytest -s -q tests/kill $(ARGS)

test-slurm: $(MADE) ## the tests on a real Slurm of many nodes; root, and what .ci/run installs
	.venv/bin/pytest tests/slurm -m slurm $(ARGS)

check: $(MADE) ## lint, format, types and the rules of the house
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy
	.venv/bin/pytest -q tests/test_house.py

bench: $(MADE) ## measure against peers and limits on this machine
	.venv/bin/python -m benchmarks $(ARGS)

peers: $(PEERS_MADE) ## the other loaders' environment, .venv-peers/, for the comparison in make bench

# torch goes in first and alone here too; the rest without dependencies, which contradict one another: its pins say how.
$(PEERS_MADE): $(PEER_PINS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "error: $(PYTHON) is not a Python 3.11 to 3.13; name one: make peers PYTHON=python3.12" >&2; exit 2; }
	@echo "making .venv-peers/ (a few minutes, once)"
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install $(shell grep '^torch==' $(PEER_PINS))
	.venv-peers/bin/pip install --no-deps -r $(PEER_PINS)
	@touch $@

test-gpu: cuda ## the tests that need a CUDA device
	.venv/bin/pytest tests/gpu $(ARGS)

bench-gpu: cuda ## the measurements that need a CUDA device
	.venv/bin/python -m benchmarks --gpu $(ARGS)

cuda: $(MADE)
	@.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "error: torch sees no CUDA device on this machine; nothing was run" >&2; exit 2; }
