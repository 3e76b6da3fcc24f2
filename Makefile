# Every target sets up what it needs, works alone, and does nothing twice that is done already.
#
#   make bench                     train the examples, then run the benchmark
#   make test                      the tests
#   make test-all                  the tests without the limits that keep `make test` short
#   make test-triton VERSION=3.7.1 the tests of the kernels with another Triton
#   make lint types                ruff; mypy on an installed copy
#   make docs                      write docs/compatibility.md
#   make dist                      wheel and sdist in dist/
#   make clean, make distclean     remove what was built; the environments as well
#
# TESTS="tests/test_x.py -k name" chooses tests, WORKERS=4 sets how many processes run them.
# Where there is no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves a large download.

SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
WORKERS ?= 2
TESTS ?=
VERSION ?= 3.7.1

python := .venv/bin/python
triton := .venv-triton-$(VERSION)
pip := -m pip --disable-pip-version-check install --quiet
# -P: the folders kernels/ and autograd/ must not be found under their bare names
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -P -m pytest -n $(WORKERS) --dist worksteal

help:
	@sed '/^$$/q; s/^# \?//' Makefile

.PHONY: help bench test test-all test-triton lint types docs dist clean distclean
.DELETE_ON_ERROR:

# (folder, extras): torch goes first, as builds of it for GPUs bring the Triton that they need
define environment
	@echo "setting up $(1) (a few minutes where torch has to be downloaded)"
	@$(1)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
	@grep -v '^triton==' constraints.txt > $(1)/constraints.txt
	@$(1)/bin/python $(pip) --constraint $(1)/constraints.txt torch
	@$(1)/bin/python -c 'from importlib.metadata import requires; \
	    exit(any(r.startswith("triton") for r in requires("torch")))' \
	    && grep '^triton==' constraints.txt >> $(1)/constraints.txt || true
endef

.venv/ready: pyproject.toml constraints.txt
	$(call environment,.venv)
	@$(python) $(pip) --constraint .venv/constraints.txt --editable '.[test,bench,plot,examples,dev]'
	@touch $@

# numpy 2.4 and later need Triton 3.7
$(triton)/ready: pyproject.toml constraints.txt
	$(call environment,$(triton))
	@if [[ '$(VERSION)' =~ ^3\.[0-6]\. ]]; then sed -i.all 's/^numpy==.*/numpy<2.4/' $(triton)/constraints.txt; fi
	@sed -i.all '/^triton==/d' $(triton)/constraints.txt
	@$(triton)/bin/python $(pip) --constraint $(triton)/constraints.txt --editable '.[test]'
	@$(triton)/bin/python $(pip) --no-deps triton==$(VERSION)
	@touch $@

bench: .venv/ready
	$(python) examples/train.py
	$(python) benchmarks/run.py

test: .venv/ready
	$(call pytest,.venv) $(or $(TESTS),tests)

test-all: .venv/ready
	FUSEDLOSS_TEST_ALL=1 $(call pytest,.venv) $(or $(TESTS),tests)

test-triton: $(triton)/ready
	@$(triton)/bin/python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	$(call pytest,$(triton)) $(or $(TESTS),$(wildcard tests/kernels tests/autograd))

lint: .venv/ready
	$(python) -m ruff check .
	$(python) -P tests/compatibility.py --check

types: .venv/ready
	@rm -rf build
	@$(python) $(pip) --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(python) -m mypy --config-file ../../pyproject.toml -p fusedloss

docs: .venv/ready
	$(python) -P tests/compatibility.py

dist: .venv/ready
	@rm -rf build dist
	$(python) -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf benchmarks/out examples/out
	find fusedloss kernels autograd tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-triton-*
