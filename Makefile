# Everything runs from .venv, made from constraints.txt by the first target that needs it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow test-clients lint docs clean

quickstart: .venv/installed        ## the whole journey on text that this machine has
	$(BIN)/moetool quickstart quickstart

test: lint                         ## lint, types, layers and the fast tests
	@# With bytecode: some tests start processes of their own, which would all compile moetool anew.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed         ## the tests that take longer
	$(BIN)/python -m pytest -m slow --timeout 1800

test-clients: .venv/installed      ## what vLLM, llama.cpp, mlx-lm and transformers 4 do with our checkpoints
	$(BIN)/python -m tests.clients

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed              ## regenerate docs/cli.md from --help
	$(BIN)/python docs/generate_cli.py

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moetool needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Beside the other packages: transformers would import it in every command, which takes seconds.
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/optional torchao==0.18.0 peft==0.21.2
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
