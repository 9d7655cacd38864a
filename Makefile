# Everything runs in the project's own virtual environment; each target first installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --disable-pip-version-check -qq -c constraints.txt
ARGS   ?=
# Without a GPU, DeepSpeed's launcher prints long warnings unless told so.
QUIETLY := $(if $(shell command -v nvidia-smi),,DS_ACCELERATOR=cpu)

.DEFAULT_GOAL := help
.PHONY: help install pretrain pipeline test slow lint format aot proof bench clean

help: ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade pip "setuptools>=64" wheel

$(VENV)/installed: $(BIN)/python setup.py pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once, a minute or two) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e ".[test]"
	@touch $@

install: $(VENV)/installed ## Make the environment and install the package in it

pretrain: $(VENV)/installed ## Train a small model on the shipped sample (ARGS="--data_path my.jsonl ..." for your own)
	@$(QUIETLY) $(BIN)/deepspeed -q train/pretrain.py $(ARGS)

pipeline: $(VENV)/installed ## The whole chain on the shipped samples, tokenizer to GRPO, in under ten minutes (ARGS="--help")
	@$(BIN)/python train/pipeline.py $(ARGS)

test: $(VENV)/installed-test ## Run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: $(VENV)/installed-test ## Run the tests that `make test` skips: a wheel under every launcher, the commands of the pages (minutes)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/installed-test ## Check formatting, lint and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Triton 3.6 beside the one that is installed: kernels must compile with both.
$(VENV)/triton-3.6/triton: $(VENV)/installed-test
	$(BIN)/pip install --disable-pip-version-check -qq --no-deps --target $(VENV)/triton-3.6 "triton==3.6.*"

proof: $(VENV)/installed-test $(if $(WHOLE),$(VENV)/triton-3.6/triton) ## Compile as `make aot` does, and execute the compiled kernels without a GPU (minutes; WHOLE=1: all dtypes, an hour)
	TRITON_3_6=$(abspath $(VENV)/triton-3.6) $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m "aot or proof$(if $(WHOLE), or whole)" tests/kernels/test_aot.py tests/proof tests/benchmarks/test_gpu_button.py $(ARGS)

aot: $(VENV)/installed-test ## Compile every kernel at every preset's shapes for all GPU architectures (minutes)
	$(BIN)/python -m pytest -m aot tests/kernels/test_aot.py $(ARGS)

bench: $(VENV)/installed-test ## Run the benchmark suite
	$(BIN)/python -m pytest benchmarks/ $(ARGS)

clean: ## Remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
