# make setup | demo | demo-image | serve | test | quick | check | mutants. Everything lives in .venv.
#
#   make setup                       for TPUs, and for planning on a Linux machine without one
#   make setup ACCELERATOR=cuda      for NVIDIA GPUs
#   make setup ACCELERATOR=cpu       for neither; the default on macOS
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                    takes torch's CPU build and saves about 3 GB on Linux
#   make setup PYTHON=/path/to/python3.12

# Empty: .ci/find_python looks for a Python 3.12 or newer.
PYTHON ?=
# By default what is installed, else tpu (cpu on macOS).
INSTALLED := $(patsubst .venv/.installed-%,%,$(firstword $(wildcard .venv/.installed-*)))
ACCELERATOR ?= $(or $(INSTALLED),$(if $(filter Darwin,$(shell uname -s)),cpu,tpu))
# An index to search beside pip's own. It is used for torch alone.
TORCH_INDEX ?=
# Workers of the test suite.
WORKERS ?= 2
PROMPT ?= a red circle moves left on a dark blue background
IMAGE ?= models/toyworld-i2v/samples/red_circle.png
DEMO_DIR ?= stage_outputs/demo
DEMO_IMAGE_DIR ?= stage_outputs/demo_image
SERVE_DIR ?= stage_outputs/served
PORT ?= 8000
export PROMPT IMAGE

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

.PHONY: setup demo demo-image serve test quick check mutants

setup: $(VENV)/.installed-$(ACCELERATOR)

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@case "$*" in tpu|cuda|cpu) ;; *) echo "ACCELERATOR=$* is not tpu, cuda or cpu"; exit 1;; esac
	@echo "[1/4] Making a virtual environment in $(VENV)"
	@test -e $@ || { python=$$(.ci/find_python $(PYTHON)) && "$$python" -m venv --clear $(VENV); }
	@echo "[2/4] Installing torch; on Linux its default build downloads about 3 GB (minutes)"
	@.ci/pip_install $(PIP) install -c constraints.txt $(TORCH_INDEX:%=--extra-index-url %) torch
	@echo "[3/4] Installing JAX for $* and the other packages (about 1 GB, a minute or two)"
	@.ci/pip_install $(PIP) install -c constraints.txt -e ".[$*,dev]"
	@echo "[4/4] Checking that the packages fit together"
	@$(PIP) check
	@touch $@
	@echo "Done. Next: make demo"

demo: setup
	@mkdir -p $(DEMO_DIR)
	@JAX_PLATFORMS=cpu $(RUN) stage1_text_encoder.py --model_id models/toyworld \
		--prompt "$$PROMPT" --dtype float32 --output_dir $(DEMO_DIR)
	@JAX_PLATFORMS=cpu $(RUN) stage2_transformer.py --input_dir $(DEMO_DIR) --dtype float32
	@JAX_PLATFORMS=cpu $(RUN) stage3_vae_decoder.py --input_dir $(DEMO_DIR) --dtype float32

demo-image: setup
	@mkdir -p $(DEMO_IMAGE_DIR)
	@JAX_PLATFORMS=cpu $(RUN) generate.py --model_id models/toyworld-i2v \
		--prompt "$$PROMPT" --image "$$IMAGE" --dtype float32 --output_dir $(DEMO_IMAGE_DIR)

# The small model on http://127.0.0.1:$(PORT).
serve: setup
	@JAX_PLATFORMS=cpu $(RUN) serve.py --model_id models/toyworld --dtype float32 --port $(PORT) \
		--output_dir $(SERVE_DIR)

test: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

# The tests that catch most mistakes, in under three minutes on two cores.
quick: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m quick

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	.ci/check_help $(CURDIR)/$(RUN)

# Plants some thirty mistakes, one at a time, and expects the tests to find each; takes long.
mutants: setup
	$(RUN) -m tests.mutants
