PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test docs mutants install install-dev lint clean

demo: install
	$(BIN)/python tools/train_net.py --config-file configs/magformer_embedded.yml --resume

test: install-dev lint docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

docs: install-dev
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs build/docs
	$(BIN)/python docs/links.py build/docs

mutants: install-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutants]'
	$(BIN)/python tests/mutants.py

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $@

lint:
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info
