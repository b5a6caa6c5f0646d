# `make demo` and `make test` set everything up on a fresh machine: Python >= 3.11, make, a C compiler.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-slow test-all check format bench gpu lab docs clean

demo: $(READY)
	$(PY) -m mogan demo

test: $(READY)
	$(PY) -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(READY)
	$(PY) -m pytest -m "slow and not gpu" -n 2 --dist loadfile

check: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(READY)
	$(PY) benchmarks/observation.py
	$(PY) benchmarks/step.py

# One GPU, no network, random weights: what full-size recipes take, part by part; without a GPU a dry run.
gpu: $(READY)
	$(PY) benchmarks/gpu.py

# Pages and docstrings as a site: build/docs/index.html. A link that leads nowhere fails.
docs: $(READY)
	$(PY) -m sphinx -q -W --keep-going -d build/docs/.doctrees docs build/docs

lab: $(READY)
	$(PY) -m mogan lab build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mogan needs Python >= 3.11: set PYTHON=python3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build dist
