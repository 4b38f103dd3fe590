# make demo   set up and run the whole pipeline on the shipped model (CPU alone, a minute or two)
# make test   the test suite        make lint   ruff and mypy        make docs   the site, in site/
PYTHON ?= python3
# The development set-up, pinned. To use the torch you have (a CUDA build, say): make demo CONSTRAINTS=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: demo test lint docs clean

demo: .venv/ready
	$(BIN)/exflow demo

test: .venv/ready
	$(BIN)/pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info
