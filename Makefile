# The two main commands are `make demo` (the complete pipeline at a small size) and `make test`.
# Each target creates .venv and installs the project on its first run.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0

# The demo and the tests run on the CPU, without network access or experiment tracking.
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= disabled
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo demo-modes test test-long test-vllm bench-demo bench-reasoning bench-grpo bench-constrained bench-pages bench-pass bench-gpu bench-data bench-corpora bench-amounts bench-train bench-serve bench-rerank rehearsal test-wheel lint format lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [SEED=n]  train and evaluate a tiny reasoning reranker; writes outputs/demo/report.html"
	@echo "make demo-modes     continue the demo with distillation; adds the comparison of the three modes to the report"
	@echo "make test           run the tests"
	@echo "make test-long      run the tests that launch several processes, and slow variants of other tests"
	@echo "make test-vllm VLLM_ENV=folder  compare vLLM, in the environment in the folder, to transformers; writes outputs/bench/engines.json"
	@echo "make test-wheel     install the wheel into a fresh environment and run the demo there"
	@echo "make bench-demo     run the demo on seeds 10, 11 and 12; writes outputs/bench/demo.json"
	@echo "make bench-reasoning  compare models with and without reasoning; writes outputs/bench/reasoning.json"
	@echo "make bench-grpo     compare GRPO with shared prompts to TRL's trainer; writes outputs/bench/grpo.json"
	@echo "make bench-constrained  measure constrained decoding next to xgrammar; writes outputs/bench/constrained.json"
	@echo "make bench-pages    measure the part of a GRPO step that is data; writes outputs/bench/pages.json"
	@echo "make bench-pass     measure mode logits over many pages on a GPU; writes outputs/bench/pass.json"
	@echo "make bench-gpu      measure the 3B and 7B shapes on a GPU, next to the plan; writes outputs/bench/gpu.json"
	@echo "make bench-data     measure the data stages, also with faults and kills; writes outputs/bench/data.json"
	@echo "make bench-corpora MMDOCIR_SLICE=folder  measure the first stage: scopes, OCR, a million pages; writes outputs/bench/corpora.json"
	@echo "make bench-amounts  count the examples of recipe mm_r5 on full-size files; writes outputs/bench/amounts.json"
	@echo "make bench-train    compare SFT to a plain TRL script, and two processes to one; writes outputs/bench/train.json"
	@echo "make bench-serve    measure the server under load and malformed requests; writes outputs/bench/serve.json"
	@echo "make bench-rerank   compare the reranker's modes to a plain loop, on three seeds; writes outputs/bench/rerank.json"
	@echo "make rehearsal      run the published recipes with a small checkpoint; writes outputs/bench/rehearsal.json"
	@echo "make lint           run ruff (lint and format), mypy, import-linter, and the check of generated documents"
	@echo "make format         format the code and apply ruff's automatic fixes"
	@echo "make setup          create .venv and install the project (other targets do this, too)"
	@echo "make lock           update constraints.txt to the newest versions that pyproject.toml allows"
	@echo "make clean          delete .venv, outputs and caches"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "expected Python 3.11 to 3.13, found " + sys.version.split()[0] + "; choose another one with: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m mmr5_train.demo seed=$(SEED)

demo-modes: setup
	$(BIN)/python -m mmr5_train.demo seed=$(SEED) overwrite=false 'leave_out=[]'

# Two processes with one thread each are faster than one process with two threads. The tests that launch several
# training processes do not run beside others: on two cores, they would take more than twice as long.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'long or launch'

test-wheel: setup
	rm -rf outputs/wheel && mkdir -p outputs/wheel/empty
	$(BIN)/uv build --quiet --wheel --out-dir outputs/wheel .
	$(BIN)/uv venv --quiet --python $(BIN)/python outputs/wheel/venv
	$(BIN)/uv pip install --quiet --python outputs/wheel/venv/bin/python --constraint constraints.txt outputs/wheel/*.whl
	cd outputs/wheel/empty && ../venv/bin/mmr5 demo seed=$(SEED)

test-vllm: setup
	VLLM_ENV='$(VLLM_ENV)' $(BIN)/python scripts/benchmarks/bench_engines.py

bench-demo: setup
	$(BIN)/python scripts/benchmarks/bench_demo.py

bench-reasoning: setup
	$(BIN)/python scripts/benchmarks/bench_reasoning.py

bench-grpo: setup
	$(BIN)/python scripts/benchmarks/bench_grpo.py --figure outputs/bench/grpo.svg

bench-constrained: setup
	$(BIN)/python scripts/benchmarks/bench_constrained.py

bench-pages: setup
	$(BIN)/python scripts/benchmarks/bench_pages.py

bench-pass: setup
	$(BIN)/python scripts/benchmarks/bench_pass.py

bench-gpu: setup
	$(BIN)/python scripts/benchmarks/bench_gpu.py

bench-data: setup
	$(BIN)/python scripts/benchmarks/bench_data.py

bench-corpora: setup
	MMDOCIR_SLICE='$(MMDOCIR_SLICE)' $(BIN)/python scripts/benchmarks/bench_retrieval.py

bench-amounts: setup
	$(BIN)/python scripts/benchmarks/bench_amounts.py

bench-train: setup
	$(BIN)/python scripts/benchmarks/bench_train.py

bench-serve: setup
	$(BIN)/python scripts/benchmarks/bench_serve.py

bench-rerank: setup
	$(BIN)/python scripts/benchmarks/bench_rerank.py

rehearsal: setup
	rm -rf outputs/rehearsal
	$(BIN)/python scripts/benchmarks/rehearse.py

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
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
		--extra vllm --upgrade -o constraints-vllm.txt pyproject.toml

clean:
	rm -rf $(VENV) outputs .mypy_cache .ruff_cache .pytest_cache *.egg-info
