# Two commands matter: `make demo` and `make test`. Both make the environment first, if it is not there.
#
#   LINE=onedl         use the maintained onedl-* forks, in an environment of their own
#   ARGS='...'         handed on to pytest, the demo or ruff: make test ARGS='-k contmix -x'
#   PYTHON=python3.11  the Python to make the environment with (3.10-3.12)
#   VENV=/some/place   where to make it

LINE ?= openmmlab
PYTHON ?= python3
VENV ?= $(if $(filter openmmlab,$(LINE)),.venv,.venv-$(LINE))
ARGS ?=

PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup test test-fast demo docs lint pins clean clean-env

help:
	@echo 'make demo      set up, then train, test and draw all three tasks on made-up scenes; ends in work_dirs/demo/report.html'
	@echo 'make test      set up, then run the tests'
	@echo 'make test-fast the same without the tests that take minutes'
	@echo 'make setup     only make the environment, $(VENV)'
	@echo 'make docs      build the documentation as a site in work_dirs/docs'
	@echo 'make lint      check the style with ruff'
	@echo 'make pins      choose versions anew: requirements/*.in -> requirements/*.txt'
	@echo 'make clean     remove what running made (not the environments)'
	@echo 'make clean-env remove $(VENV)'
	@echo 'Variables: LINE=onedl, ARGS=..., PYTHON=python3.11, VENV=...; the top of the Makefile says what they do.'

setup:
	@command -v $(PYTHON) >/dev/null || { echo "[set-up] ERROR: no '$(PYTHON)' on the PATH. Install Python 3.10-3.12, for example: apt-get install python3 python3-dev python3-venv" >&2; exit 1; }
	@$(PYTHON) tools/dev/setup_env.py --line $(LINE) --venv $(VENV)

# A file of tests to a process, one process a core; each process computes with one thread. In the order that
# tests/conftest.py puts them in: by default files with few tests come last, and among them are the longest.
test: setup
	@$(PY) tools/dev/install_browser.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

test-fast:
	@$(MAKE) --no-print-directory test ARGS='-m "not slow" $(ARGS)'

demo: setup
	$(PY) tools/demo/run_demo.py $(ARGS)

docs: setup
	$(PY) -m sphinx -b html -W --keep-going $(ARGS) docs work_dirs/docs
	@echo 'open work_dirs/docs/index.html'

lint: setup
	$(PY) -m ruff check $(ARGS) .
	$(PY) -m ruff format --check $(ARGS) .

# A universal file: it holds for every supported Python, with markers where versions differ.
pins: setup
	cd requirements && for line in openmmlab onedl; do \
	  ../$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --excludes excludes.txt \
	    --no-annotate --custom-compile-command 'make pins' $$line.in -o $$line.txt || exit 1; \
	done

clean:
	rm -rf work_dirs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

clean-env:
	rm -rf $(VENV) $(VENV).lock
