PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-long test-oldest docs mutants install install-dev lint package clean

demo: install
	$(BIN)/relreid train --config-file magformer_embedded.yml --resume

test: install-dev lint docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# what repeats at length what `make test` watches as well
test-long: install-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m long

# the site, into build/docs: a warning or a broken link is an error
docs: install-dev
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs build/docs
	$(BIN)/python docs/links.py build/docs

# the lower bounds of setup.py in an environment of their own, and the tests that need no training
OLDEST ?= .venv-oldest
OLDEST_TESTS ?= $(addprefix tests/,config/test_config.py config/test_keys.py metrics/test_ranking.py metrics/test_reranking.py \
	metrics/test_expansion.py metrics/test_neighbours.py magformer/test_relation.py rib/test_dcs.py rib/test_information.py \
	graft/test_graft.py backbones/test_losses.py backbones/test_models.py backbones/test_weights.py search/test_seal.py \
	search/test_store.py host/test_host.py data/test_data.py test_reading.py) \
	$(filter-out tests/cli/test_train_net.py,$(wildcard tests/cli/test_*.py))

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
