# make demo    a bundled picture, question and model: the hybrid cache beside the full cache
# make test    lint and tests; make test-slow, the tests that compile much; make test-browser, those that need Chromium
# They make their own virtual environment with pinned versions. PYTHON chooses the interpreter, 3.11 or later.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= 2  # processes that share the tests, file by file; each wants a core and 2 GB

.PHONY: demo test test-slow test-browser lint clean

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
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-fail-under=90

test-slow: $(VENV)/ready
	$(PY) -m pytest --numprocesses $(WORKERS) -m slow

# Chromium itself: Debian's package of that name, or $(PY) -m playwright install chromium
test-browser: $(VENV)/ready
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(PY) -m pytest -m browser -rs tests/test_browser.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache
