# Every target sets up .venv by itself, when it is not there or pyproject.toml or constraints.txt changed since.
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help demo test test-slurm lint bench fuzz torture audit clean

help:  ## say what there is
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1	/p' Makefile

demo: $(READY)  ## find every nucleus of a small slide; results in demo/
	$(VENV)/bin/wsipipe demo --out demo

test: $(READY)  ## run the tests
	$(PY) -m pytest

test-slurm: $(READY)  ## run two slides through a SLURM of its own; installs Debian's, needs root
	@sh tests/slurm.sh $(PY) -m pytest -m slurm tests/test_slurm.py || { code=$$?; [ $$code = 77 ] || exit $$code; }

lint: $(READY)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/snakefmt --check Snakefile workflows
	$(PY) -m mypy

bench: $(READY)  ## measure: run every file of benchmarks/ in turn
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PY) "$$file"; done

fuzz: $(READY)  ## read 100,000 damaged and hostile files; every reader must refuse or answer rightly
	$(PY) tests/fuzz.py --inputs 100000

torture: $(READY)  ## kill each stage at 50 random moments, go on, compare every byte
	$(PY) tests/torture.py --kills 50

audit: $(READY)  ## look for known weaknesses of the pinned versions; asks PyPI's advisory service
	$(PY) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

clean:  ## remove the demo, builds and caches; .venv stays
	rm -rf demo build dist fuzz-findings .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find wsipipe tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A Python counts if it starts, is new enough and can make a virtual environment: Debian splits that off.
$(READY): pyproject.toml constraints.txt
	@set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  for python in python3.13 python3.12 python3.11 python3; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "wsipipe needs Python 3.11 or newer with its venv module; install it, e.g. apt install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version); the downloads take some minutes"; \
	  $$found -m venv --clear $(VENV); \
	fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $(READY)
