# Two commands to know: `make demo` (the whole pipeline, small) and `make test`.
# Each makes .venv and installs what it needs the first time.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0

# The demo and the tests are CPU runs that reach no network and track nothing.
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= disabled
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo demo-modes test bench-grpo bench-data bench-train bench-serve bench-rerank test-wheel lint format lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [SEED=n]  train and evaluate a tiny reasoning reranker, write outputs/demo/report.html"
	@echo "make demo-modes     go on from there: teach it one forward pass, compare the three modes in the report"
	@echo "make test           run the tests"
	@echo "make test-wheel     install the wheel with its dependencies into a fresh environment, and run the demo from there"
	@echo "make bench-grpo     time GRPO with shared prompts beside TRL's trainer, write outputs/bench/grpo.json"
	@echo "make bench-data     time the data stages, and kill them while calls fail, write outputs/bench/data.json"
	@echo "make bench-train    time SFT beside a bare TRL script, and two processes beside one, write outputs/bench/train.json"
	@echo "make bench-serve    the server under load and under malformed requests, write outputs/bench/serve.json"
	@echo "make bench-rerank   the reranker's modes beside a plain loop, three seeds, write outputs/bench/rerank.json"
	@echo "make lint           ruff (lint, format), mypy, the import rules, and whether generated documents are current"
	@echo "make format         let ruff rewrite what it can"
	@echo "make setup          make .venv and install (the other targets do it too)"
	@echo "make lock           write constraints.txt anew from pyproject.toml"
	@echo "make clean          remove .venv, outputs and caches"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, found " + sys.version.split()[0] + "; say which with: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m mmr5_train.demo seed=$(SEED)

demo-modes: setup
	$(BIN)/python -m mmr5_train.demo seed=$(SEED) overwrite=false 'leave_out=[]'

# Two processes with a thread each: faster than one with two.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-wheel: setup
	rm -rf outputs/wheel && mkdir -p outputs/wheel/empty
	$(BIN)/uv build --quiet --wheel --out-dir outputs/wheel .
	$(BIN)/uv venv --quiet --python $(BIN)/python outputs/wheel/venv
	$(BIN)/uv pip install --quiet --python outputs/wheel/venv/bin/python --constraint constraints.txt outputs/wheel/*.whl
	cd outputs/wheel/empty && ../venv/bin/mmr5 demo seed=$(SEED)

bench-grpo: setup
	$(BIN)/python scripts/benchmarks/bench_grpo.py --figure outputs/bench/grpo.svg

bench-data: setup
	$(BIN)/python scripts/benchmarks/bench_data.py

bench-train: setup
	$(BIN)/python scripts/benchmarks/bench_train.py

bench-serve: setup
	$(BIN)/python scripts/benchmarks/bench_serve.py

bench-rerank: setup
	$(BIN)/python scripts/benchmarks/bench_rerank.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/document_formats.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(BIN)/uv pip compile --quiet --universal --no-header --no-annotate --python-version 3.11 --extra dev --upgrade -o constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) outputs .mypy_cache .ruff_cache .pytest_cache *.egg-info
