# make demo    a bundled picture, question and model: the hybrid cache beside the full cache
# make test    lint and tests
# Both make their own virtual environment with pinned versions. PYTHON chooses the interpreter, 3.11 or later.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint clean

# torch first, and the CPU build where there is one: on machines without a GPU the default build is gigabytes larger.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[bench,test]'
	touch $@

demo: $(VENV)/ready
	$(PY) -m hybridkv.generate

test: lint
	$(PY) -m pytest --cov --cov-fail-under=90

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache
