# Two commands do everything: `make demo` and `make test`. While you work: `make check` (format, lint,
# types), `make quick` (tests of what you changed), `make one ARGS=tests/hooks/test_monitor.py` (one test).
# Each installs what it needs into .venv once; it asks pip again only when the two files below change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DELETE_ON_ERROR:
.PHONY: demo test check quick one bench fmt docs clean

PYTHON ?=
CURVES ?=
BIN := .venv/bin
PINS := pyproject.toml constraints.txt
# PIP_CONSTRAINT also holds inside pip's own build environment, `-c` does not everywhere.
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt

demo: .venv/.installed
	$(BIN)/geodiag demo $(ARGS)

test: check
	.ci/chromium
	# A worker a core, one thread each; a file's tests stay together, since they share what is slow to make.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quick: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $$($(BIN)/python tools/changed_tests.py) -m "not slow and not browser and not triton" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

one: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

bench: .venv/.installed
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	if [ -n "$(CURVES)" ]; then $(BIN)/python benchmarks/spikes.py "$(CURVES)"; fi
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(BIN)/geodiag bench kernels; fi

fmt: .venv/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.installed
	$(BIN)/python -m geodiag.metrics.catalogue > docs/metrics.md
	$(BIN)/python -m geodiag.cli.reference > docs/cli.md
	$(BIN)/python -m geodiag.hooks.faults > docs/faults.md

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	for try in $(PYTHON) python3 python3.13 python3.12 python3.11; do
	  command -v "$$try" >/dev/null || continue
	  "$$try" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
	  echo "Making .venv with $$("$$try" --version)"
	  "$$try" -m venv .venv && exit 0
	  rm -rf .venv
	  echo "$$try cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
	  exit 1
	done
	echo "geodiag needs Python 3.11 or newer; install one, or name it: make demo PYTHON=/path/to/python3.11" >&2
	exit 1

.venv/.installed: $(PINS) | $(BIN)/python
	echo "Installing geodiag and its pinned dependencies into .venv (once; a few minutes)"
	$(PIP) -e '.[all]'
	touch $@

.venv/.installed-test: $(PINS) .venv/.installed
	echo "Installing what the tests need into .venv (once)"
	$(PIP) -e '.[test]'
	touch $@
