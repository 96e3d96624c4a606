# Each target sets up .venv by itself and does nothing twice. PYTHON names another interpreter of 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-all lint clean

demo: $(VENV)/core
	$(BIN)/python prep.py demo
	$(BIN)/python train.py --recipe demo
	$(BIN)/python -m modalities.generate runs/demo --prompt "    def __init__(self"

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint $(VENV)/eval
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/eval: $(VENV)/dev
	$(PIP) --editable '.[eval]'
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, but $(PYTHON) is older; name another: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
