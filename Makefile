PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-oldest docs mutants install install-dev lint package clean

demo: install
	$(BIN)/relreid train --config-file magformer_embedded.yml --resume

test: install-dev lint docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# the site, into build/docs: a warning or a broken link is an error
docs: install-dev
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs build/docs
	$(BIN)/python docs/links.py build/docs

# the lower bounds of setup.py in an environment of their own, and the tests that need no training
OLDEST ?= .venv-oldest
OLDEST_TESTS ?= tests/test_config.py tests/test_keys.py tests/test_ranking.py tests/test_reranking.py tests/test_expansion.py \
	tests/test_neighbours.py tests/test_relation.py tests/test_dcs.py tests/test_losses.py tests/test_information.py \
	tests/test_graft.py tests/test_models.py tests/test_weights.py tests/test_seal.py tests/test_store.py tests/test_host.py \
	tests/test_data.py tests/test_reading.py tests/cli

test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools<81'
	$(OLDEST)/bin/python tests/oldest.py all dev > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all]' pytest pytest-xdist \
		--constraint $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(OLDEST_TESTS)

# sdist and wheel, checked
package: install-dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

mutants: install-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutants]'
	$(BIN)/python tests/planted.py
	$(BIN)/python tests/mutants.py

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	touch $@

$(VENV)/installed-dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $@

lint:
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
