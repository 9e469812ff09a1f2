# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-all lint format schema clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# torch is named first and exactly, so that an index with CPU builds is asked for that one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed  ## pretrain, reset, continue, compare: offline, on a CPU, in minutes (ARGS="--num-processes 2")
	$(BIN)/fire-llm demo $(ARGS)

test: $(VENV)/.installed  ## run the tests (no network, no accelerator)
	$(PYTEST)

test-all: $(VENV)/.installed  ## run the slow tests too
	$(PYTEST) -m 'not gpu'

lint: $(VENV)/.installed  ## check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed  ## write the JSON schema that editors complete recipes from
	$(BIN)/fire-llm check --schema > recipes/schema.tmp && mv recipes/schema.tmp recipes/recipe.schema.json

clean:  ## delete the environment, not the runs
	rm -rf $(VENV)
