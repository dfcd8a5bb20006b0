# make venv   sets up .venv from requirements.txt
# make demo   trains a small model on made-up recordings: runs anywhere, three minutes on two cores
# make test   all tests; WORKERS=8 runs as many files at a time, on a machine with cores and memory for it
# make faults kills, damages and preempts runs for a quarter of an hour, and writes the table in docs/reliability.md
# make lint   ruff and pyright

PYTHON ?= python3
VENV := .venv
WORKERS ?= 2

.PHONY: venv demo test faults lint

venv: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

demo: venv
	$(VENV)/bin/python scripts/demo.py

test: venv
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

faults: venv
	$(VENV)/bin/python -m pytest -m fault --all-faults

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
