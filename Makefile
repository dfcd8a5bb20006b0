# make venv   sets up .venv from requirements.txt
# make demo   trains a small model on made-up recordings: runs anywhere, three minutes on two cores
# make test   all tests
# make lint   ruff and pyright

PYTHON ?= python3
VENV := .venv

.PHONY: venv demo test lint

venv: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

demo: venv
	$(VENV)/bin/python scripts/demo.py

test: venv
	$(VENV)/bin/python -m pytest

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
