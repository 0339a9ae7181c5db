# `make sweep` and `make test` need Python >= 3.11 and make; they set up .venv themselves, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help sweep sweep-full test test-zoo test-timm test-interpreted test-kernels test-scale test-fuzz test-instruct lint docs bench bench-env gpu gpu-kernels gpu-training
help:
	@echo "make sweep       compare five connectors on the embedded world (about 12 minutes on two cores)"
	@echo "make sweep-full  the same with two encoders, two LLMs, five seeds and several times the steps (six hours)"
	@echo "make test        lint, types, tests, and the wheel in an empty environment"
	@echo "make test-zoo    of these, connectors and imported models alone"
	@echo "make test-timm   of these, those that need timm"
	@echo "make test-kernels  the kernels at every size, under Triton's interpreter and compiled for two GPUs (four minutes)"
	@echo "make test-scale  two processes by DDP, FSDP2 and ZeRO, and a run that is killed again and again (ten minutes)"
	@echo "make test-fuzz   several thousand damaged records, images and data files (five minutes)"
	@echo "make test-instruct  synthesize, killed more often, and 10,000 records (two minutes)"
	@echo "make bench       the kernels' time and memory against their peers, on this machine (eight minutes on two cores)"
	@echo "make gpu         on this machine's GPU: the kernels' tests, their fastest tiles, tables of them and of training a 7B"
	@echo "make docs        docs/connectors.md, docs/parity.md and the tables of docs/scale.md, from what the code does"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vlmzoo needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: .venv
.venv: .venv/installed

sweep: .venv/installed
	$(BIN)/vlmzoo sweep experiments/connectors.yaml --out runs/connectors

sweep-full: .venv/installed
	$(BIN)/vlmzoo sweep experiments/connectors-full.yaml --out runs/connectors-full

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Beside the environment, not in it: with torchvision in reach transformers does much by it, and not every one loads.
.venv/timm: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		--constraint constraints.txt timm torchvision
	@touch $@

# Without what they depend on: they would bring other versions of what is there.
.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		flamingo-pytorch perceiver-pytorch einops-exts
	@touch $@

bench-env: .venv/bench

bench: bench-env
	$(BIN)/python -m vlmzoo.kernels.bench --peers --json runs/bench.json

# With the python3 on the PATH, which brings its own PyTorch for CUDA, and without .venv; each ten minutes at most.
GPU_OUT ?= experiments/results/gpu
gpu: gpu-kernels gpu-training

gpu-kernels:
	$(PYTHON) -m pytest tests/kernels/test_gpu.py tests/kernels/test_splice.py -p no:cacheprovider
	$(PYTHON) -m vlmzoo.kernels.bench --gpu --tune --out $(GPU_OUT)

gpu-training:
	PYTHONPATH=. $(PYTHON) experiments/benchmarks/train_on_gpu.py --out $(GPU_OUT)

docs: .venv/timm
	$(BIN)/python -m vlmzoo.sweeps.cards docs
	$(BIN)/python -m experiments.benchmarks.capacity docs/scale.md
	PYTHONPATH=.venv/timm $(BIN)/python -m tests.interop.parity docs

test: lint test-timm test-interpreted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		-m "not kernels and not scale and not fuzz and not instruct"

# Triton reads TRITON_INTERPRET when a kernel's file is imported: a process of its own.
INTERPRETED := TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 \
	tests/kernels/interpreted

test-interpreted: .venv/installed
	$(INTERPRETED) -m "not kernels"

test-kernels: .venv/installed
	$(INTERPRETED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/kernels

# Several processes every way, more kills; the first run compiles an operator of DeepSpeed's (a minute).
test-scale: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/training -m scale

test-fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/data -m fuzz

test-instruct: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/instruct -m instruct

test-timm: .venv/timm
	PYTHONPATH=.venv/timm OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interop tests/vision -m timm

test-zoo: test-timm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/connectors tests/interop tests/vision
