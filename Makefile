# make quickstart | test | slow | faults | check | audit | matrix | format | settings | keys | bench | upstream | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart setup test slow faults check audit matrix format settings keys bench upstream clean

quickstart: $(VENV)/installed
	$(BIN)/python main_pretrain.py --config-name metamask_barlow

setup: $(VENV)/installed-test

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

# injects every fault, the long ones too, and prints the table of docs/reliability.md
faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "fault or load" --junitxml=build/faults.xml; \
	$(BIN)/python tools/fault_table.py build/faults.xml

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/audit.py

# as check does, and fails where the advisories cannot be asked for
audit: $(VENV)/installed-dev
	$(BIN)/python tools/audit.py --strict

# tests on Python 3.10 to 3.13 with the lowest and the newest dependencies: what was run, and what was not
matrix: $(VENV)/installed-dev
	$(BIN)/python tools/matrix.py

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# rewrites docs/settings.md from tools/settings.yaml and the configs
settings: $(VENV)/installed
	$(BIN)/python tools/settings_page.py

# rewrites docs/keys.md from the tables that configs are checked against
keys: $(VENV)/installed
	$(BIN)/python tools/keys_page.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run_all.py

# lays the methods into a copy of solo-learn, see docs/upstream.md
upstream: $(VENV)/installed-test
	$(BIN)/python upstream/generate.py $(SOLO) $(DEST)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@
