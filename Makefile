# Every target works from a bare clone: the virtual environment is made on the way. Another Python has its own:
# make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two workers, each with a half of the files in order, so that they share few imports and module fixtures; the one that
# ends first takes tests of the other.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal -q

# Without files of bytecode each worker and each process that a test starts compiles the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-all fuzz lint format notebooks docs dist clean

demo: $(INSTALLED)
	$(BIN)/pyro-flows demo

# Everything but the tests marked slow.
test: lint
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-all: test test-slow

# Ten thousand generated calls; not a part of the continuous integration.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --calls 10000

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(INSTALLED)
	for notebook in notebooks/*.ipynb; do $(BIN)/jupyter-execute "$$notebook" || exit 1; done

# The site, in docs/_build/html; a warning fails.
docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

# Wheel and sdist, checked; their tools live in an environment of their own.
dist: $(VENV)-dist/.installed
	rm -rf dist
	$(VENV)-dist/bin/python -m build -q
	$(VENV)-dist/bin/twine check --strict dist/*

$(VENV)-dist/.installed:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install -q build twine
	touch $@

clean:
	rm -rf docs/_build docs/notebooks docs/reference $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
