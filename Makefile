# make demo: everything from nothing to figures. make test: the test suite. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# One thread per process: two threads on a busy two-core machine are many times slower.
export OMP_NUM_THREADS ?= 1
# dvc and jepa-cache start `python`; it must be this one.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test lint format clean

install: $(INSTALLED)

# Made again only when pyproject.toml or the tried versions changed. constraints.txt holds versions that were seen to work together.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@echo "installing into .venv: some minutes, 2.2 GB"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/dvc repro
	@echo
	@echo "figures: outputs/evaluate/metrics.json, pictures: outputs/evaluate/pictures/"; echo "next: source .venv/bin/activate, then dvc exp run -S train.lr=3e-4"

test: install
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs shards
