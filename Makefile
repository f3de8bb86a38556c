# Two commands, each doing all its own set-up in .venv: `make demo` and `make test`.
# Modules are compiled when first imported: compiling all that is installed takes a minute, most of it for nothing.
# What was compiled is kept, whatever the shell says, as the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs format clean

demo: $(VENV)/installed
	@$(BIN)/brittle demo -o brittle-demo

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet --strict
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

docs: $(VENV)/installed-test
	$(BIN)/mkdocs build --quiet --strict
	@echo "The documentation: site/index.html"

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site brittle-demo brittle-audit

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Brittle needs Python 3.11 or newer; name one: make demo PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) (fetches PyTorch once; this can take some minutes) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) for the tests (fetches PyTorch once; this can take some minutes) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/installed
