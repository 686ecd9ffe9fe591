# make quickstart   set up, train two small models on this machine, measure them, write report.html
# make test         set up and run the tests (about ten minutes on two cores at most)
# make lint         ruff and mypy
# make venv         set up only
# make clean        remove everything these targets made

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Left behind by an installation of the package, and of the package with the tools of its developers.
USER_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# Without --no-compile pip spends half a minute on bytecode of which most is never loaded.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# The quickstart and the tests start many processes; without cached bytecode each compiles all of torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-slow lint venv clean

quickstart: $(USER_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/nestor quickstart $(ARGS)

test: $(DEV_STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-slow: $(DEV_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(DEV_STAMP)

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed again only when what is to be installed has changed.
$(USER_STAMP): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[dev]'
	@touch $(USER_STAMP) $@

clean:
	rm -rf $(VENV) runs build dist report.html nestor.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
