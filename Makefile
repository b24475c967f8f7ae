# Everything runs in .venv, made from PYTHON; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNIT := build/unit
GPU := build/gpu

.DEFAULT_GOAL := help
.PHONY: help demo unit test check docs slow bench gpu tensorrt samples clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(UNIT)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(UNIT)
	$(UNIT)/bin/python -m pip install --quiet --upgrade pip
	$(UNIT)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[unit]'
	@touch $@

$(GPU)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --upgrade pip
	$(GPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,gpu,tensorrt]'
	@touch $@

demo: $(READY)  ## Export a sample checkpoint, check parity, search in many languages, write demo/index.html
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.demo --out demo

unit: $(UNIT)/.ready  ## Run the tests that need no torch and no server, in an environment of their own (two minutes)
	OMP_NUM_THREADS=1 $(UNIT)/bin/python -m pytest --unit --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(READY)  ## Run the tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(READY)  ## Format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: $(READY)  ## Export every published variant at true size with random weights (up to an hour, 20 GB)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

bench: $(READY)  ## Measure the sample models: peaks, latency, throughput, retrieval, corpus (build/bench)
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.run

gpu: $(READY)  ## Build the bundle that measures a machine with a GPU, and try it on this processor (build/gpu-bundle)
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.gpu bundle --out build/gpu-bundle --work build/gpu-work
	PYTHON=$(abspath $(BIN)/python) BABELTOWER_GPU_WORK=build/gpu-dry sh build/gpu-bundle/run.sh build/gpu-dry/out --dry

tensorrt: $(GPU)/.ready  ## On a machine with an NVIDIA GPU: build, judge and time TensorRT's engines (see docs/gpu.md)
	HF_HUB_OFFLINE=1 $(GPU)/bin/python -m bench.gpu tensorrt

samples: $(READY)  ## Build the sample data and train the sample checkpoints anew (about an hour)
	$(BIN)/python -m pip install --quiet --editable '.[samples]'
	$(BIN)/python -m samples.build
	HF_HUB_OFFLINE=1 $(BIN)/python -m samples.train --work build/samples

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) demo gpu build dist
