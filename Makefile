# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest $(OPTIONS)
OPTIONS = -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# The lowest versions that pyproject.toml allows, with the lowest torch and Python (LOWEST) or with the locked torch and
# PYTHON (FLOOR): an older torch is a download of gigabytes.
LOWEST_PYTHON ?= python3.10
LOWEST := $(VENV)-lowest
FLOOR  := $(VENV)-floor
TORCH        := $(shell grep '^torch==' constraints.txt)
LOWEST_TORCH := $(shell sed -n 's/^ *"torch>=\(.*\)",$$/torch==\1/p' pyproject.toml)
# What of the suite fits into ten minutes, installing included.
FLOOR_TESTS := $(addprefix tests/,$(addsuffix .py,test_imports core/test_compat test_models architectures/test_layout \
	checkpoint/test_rewrite evaluation/test_perplexity experiment/test_losses training/test_trainer))

# Dozens of processes import the package and the tests: compiled once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-all coverage test-lowest test-floor ratios lint format schema docs notebooks clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# torch is named first and exactly, so that an index with CPU builds is asked for that one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11, \
which constraints.txt needs: PYTHON=python3.12 make …, or pip install -e ."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

# torch comes first and alone: what it needs is resolved with the rest, at its lowest where it is ours too.
define at_their_lowest
$(1) -m venv --clear $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(2)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
$(@D)/bin/python -m uv pip install --quiet --python $(@D) --resolution lowest-direct '$(2)' -e '.[test]'
$(@D)/bin/python scripts/check_floors.py $(3)
@touch $@
endef

$(LOWEST)/.installed: pyproject.toml constraints.txt
	@$(LOWEST_PYTHON) -c '' 2>/dev/null || echo "there is no $(LOWEST_PYTHON): $(PYTHON) instead; set LOWEST_PYTHON"
	$(call at_their_lowest,$(shell $(LOWEST_PYTHON) -c '' 2>/dev/null && echo $(LOWEST_PYTHON) || echo $(PYTHON)),$(LOWEST_TORCH))

$(FLOOR)/.installed: pyproject.toml constraints.txt
	$(call at_their_lowest,$(PYTHON),$(TORCH),torch)

demo: $(VENV)/.installed  ## pretrain, reset, continue, compare: offline, on a CPU, in minutes (ARGS="--num-processes 2")
	$(BIN)/fire-llm demo $(ARGS)

test: $(VENV)/.installed  ## run the tests: no network, no accelerator (ARGS="--durations=30")
	$(PYTEST)

test-all: $(VENV)/.installed  ## run the slow tests too
	$(PYTEST) -m 'not gpu'

coverage: $(VENV)/.installed  ## run the tests and count the lines they reach; fails below the floor in pyproject.toml
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(OPTIONS)
	$(BIN)/coverage report

test-lowest: $(LOWEST)/.installed  ## run the tests at the lowest versions that pyproject.toml allows (gigabytes)
	$(LOWEST)/bin/python -m pytest $(OPTIONS)

test-floor: $(FLOOR)/.installed  ## run a part of the tests at the lowest versions, but for torch and Python
	$(FLOOR)/bin/python -m pytest $(OPTIONS) $(FLOOR_TESTS)

ratios: $(VENV)/.installed  ## run the benchmarks whose ratios are tracked: minutes (ARGS="--only plan", ARGS=--write)
	$(BIN)/python scripts/check_ratios.py $(ARGS)

lint: $(VENV)/.installed  ## check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed  ## write the JSON schemas, the tables of docs/results-schema.md and docs/trainer.md, and docs/results.md
	$(BIN)/fire-llm check --schema > recipes/schema.tmp && mv recipes/schema.tmp recipes/recipe.schema.json
	$(BIN)/fire-llm report --schema > docs/schema.tmp && mv docs/schema.tmp docs/results.schema.json
	$(BIN)/python scripts/write_schema_page.py
	$(BIN)/python scripts/write_trainer_page.py
	$(BIN)/python scripts/write_results_page.py

# What builds the site is installed where it is asked for.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## build the site into site/; warnings, broken links and misspelt words are errors
	$(BIN)/codespell
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/mkdocs build --quiet

notebooks: $(VENV)/.installed  ## run the tutorials and store what they print
	$(BIN)/python scripts/write_notebooks.py

clean:  ## delete the environments, not the runs
	rm -rf $(VENV) $(LOWEST) $(FLOOR)
