# Targets create .venv and install into it what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A folder with the published per-layer tables; tests of the `published` cost model read it.
PAPER_TABLES ?=

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[demo,test]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo --output=build/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(if $(PAPER_TABLES),--paper-tables=$(PAPER_TABLES))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.benched: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

bench: $(VENV)/.benched
	$(BIN)/python -m benchmarks.resnet50 --output=benchmarks/results/resnet50
	$(BIN)/python -m benchmarks.block_matmul --preset=square --preset=resnet50 --output=benchmarks/results/block_matmul

clean:
	rm -rf build $(VENV) *.egg-info
