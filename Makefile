# make demo   set up and run the whole pipeline on the shipped model (CPU alone, a minute or two)
# make test   the test suite        make lint   ruff and mypy        make docs   the site, in site/
# make test-all   what make test leaves out: slow tests, and the suite on the oldest and newest dependencies
PYTHON ?= python3
# The development set-up, pinned. To use the torch you have (a CUDA build, say): make demo CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# A process for each core, at most 4; a file of tests stays in one of them, since it shares jobs of several ranks.
TOGETHER := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint test-oldest test-newest docs clean

# one thread in each process: more would wait for each other
test test-all test-oldest test-newest: export OMP_NUM_THREADS = 1

demo: .venv/ready
	$(BIN)/exflow demo

test: .venv/ready
	$(BIN)/pytest $(TOGETHER)

test-all: .venv/ready
	$(BIN)/pytest $(TOGETHER) -m all
	$(MAKE) test-oldest
	$(MAKE) test-newest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The suite on the lower bounds of dependencies, and on the newest there are; each in a set-up of its own, with its
# own cache of compiled code. Both on the torch of constraints.txt, and the triton that goes with it: every other one is
# gigabytes. On the bound of torch itself: make test-oldest TORCH=torch==2.11. PYTEST_ADDOPTS chooses tests.
TORCH ?= $(shell grep -E '^(torch|triton)==' constraints.txt)

test-oldest: export NUMBA_CACHE_DIR := $(CURDIR)/.venv-oldest/numba
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	grep -v '^torch==' constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet -c .venv-oldest/constraints.txt -e . $(TORCH) pytest pytest-xdist hypothesis pebble setuptools
	.venv-oldest/bin/pytest $(TOGETHER) --disable-warnings

test-newest: export NUMBA_CACHE_DIR := $(CURDIR)/.venv-newest/numba
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]' $(TORCH)
	.venv-newest/bin/pytest $(TOGETHER)

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist site *.egg-info
