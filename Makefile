# Two commands for everyone: `make train` and `make test`. Both make the environment they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
ARGS ?=

.PHONY: help train test faults survival lint bench clean

help:
	@echo "make train [ARGS='--ask.rho 0.5 …']  train ASK on Ray from nothing, and print where the results are"
	@echo "make test                            lint, type-check and test"
	@echo "make faults                          runs during which processes are killed and files damaged (docs/reliability.md)"
	@echo "make survival                        whole sweeps, also such as are killed and interrupted, and storage that goes away"
	@echo "make bench                           the measured ratios, in benchmarks/"
	@echo "make clean                           remove the environment (runs/ and prepared/ stay)"

train: $(READY)
	$(BIN)/python jobs/train.py $(ARGS)

test: lint
	$(BIN)/python -m pytest

faults: $(TEST_READY)
	$(BIN)/python -m pytest -m faults --table docs/reliability.md tests/faults

survival: $(TEST_READY)
	$(BIN)/python -m pytest -m survival tests/faults tests/tuning tests/test_remote.py

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/refresh.py
	$(BIN)/python benchmarks/prepare.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ask_ray needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)

# The stamps are written last: an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(READY) $@

clean:
	rm -rf $(VENV)
