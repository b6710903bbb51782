# make demo   install into .venv, fetch a small model, answer a prompt with it
# make test   install what the tests need too, and run them         (make test ARGS="-k pages" for some)
# make check  ruff and mypy
# make clean  remove .venv and what was built; downloaded models stay
#
# PYTHON=python3.12   the interpreter to make .venv with
# TORCH=cpu|pypi      which build of torch: cpu is the default on Linux without an NVIDIA driver, as PyPI's brings several GB
#                     of CUDA libraries; pypi takes whatever pip's own indexes offer
# TORCH_INDEX=URL     where to look for the CPU build if pip's own indexes have none

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MODEL ?= smollm2-135m-instruct
PROMPT ?= Why does the sea have tides?
ARGS ?=

ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= cpu
endif
TORCH ?= pypi

bin := $(VENV)/bin
install := $(bin)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
torch := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo test check clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/.core
	$(bin)/slipstream pull $(MODEL)
	$(bin)/slipstream generate $(MODEL) "$(PROMPT)" --chat --max-new-tokens 128 --temperature 0

# One thread a process, and one process a core: tiny tensors gain nothing from threads.
test: $(VENV)/.test
	$(bin)/slipstream pull $(MODEL)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

check: $(VENV)/.dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "slipstream needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	"Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV): about a minute and 1.2 GB, once"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# pip's own indexes first: where they have the CPU build, no other host is asked.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "Installing $(torch) ($(TORCH))"
ifeq ($(TORCH),cpu)
	@$(install) '$(torch)+cpu' 2>/dev/null \
	  || $(install) --retries 2 --extra-index-url $(TORCH_INDEX) '$(torch)+cpu' \
	  || { echo "No CPU build at $(TORCH_INDEX); taking the build that pip's own indexes offer." >&2; $(install) '$(torch)'; }
else
	@$(install) '$(torch)'
endif
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing slipstream"
	@$(install) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "Installing what the tests need"
	@$(install) --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing what the checks need"
	@$(install) --editable '.[dev]'
	@touch $@
