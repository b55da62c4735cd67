# make setup | demo | test | lint. Everything lives in .venv; nothing else is touched.

PYTHON ?= python3.11
PROMPT ?= a red circle moves left on a dark blue background
DEMO_DIR ?= stage_outputs/demo
export PROMPT
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test lint

setup: $(VENV)/.installed

# torch comes first and by its exact version, so that no other build of it is pulled in.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	@mkdir -p $(DEMO_DIR)
	@JAX_PLATFORMS=cpu $(RUN) stage1_text_encoder.py --model_id models/toyworld \
		--prompt "$$PROMPT" --dtype float32 --output_dir $(DEMO_DIR)
	@JAX_PLATFORMS=cpu $(RUN) stage2_transformer.py --input_dir $(DEMO_DIR) --dtype float32
	@JAX_PLATFORMS=cpu $(RUN) stage3_vae_decoder.py --input_dir $(DEMO_DIR) --dtype float32

test: setup
	$(RUN) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
