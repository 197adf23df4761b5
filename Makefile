# Everything lives in .venv, installed once; it is installed again when these two files change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test faults soak check wheel format
.DELETE_ON_ERROR:

demo: $(VENV)/base.stamp
	$(BIN)/patchword demo

test: $(VENV)/dev.stamp
	$(PYTEST)

# What make test does a little of, longer: kills, mutated files, flipped bits. Minutes.
faults: $(VENV)/dev.stamp
	$(PYTEST) --effort faults tests/faults

# The same at full counts, for hours; the record goes to benchmarks/results.
soak: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/soak.py

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/sizes.py
	$(BIN)/python -m pip check

# Builds the wheel into dist, and tries it in an empty environment.
wheel: $(VENV)/pyvenv.cfg
	scripts/wheel.sh $(BIN)/python

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/base.stamp: $(PINS) | $(VENV)/pyvenv.cfg
	@echo "Installing patchword into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: $(PINS) | $(VENV)/pyvenv.cfg
	@echo "Installing patchword and its development tools into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[dev]'
	@touch $(VENV)/base.stamp $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "patchword needs Python 3.11 or newer and $(PYTHON) is not; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
