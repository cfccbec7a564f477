# make quickstart    a virtual environment, the installation, and the whole chain in minutes
# make install       only the first two                 (PYTHON=python3.12, CUDA=12 where wanted)
# make test check    the tests; ruff and mypy           (ARGS="-k plan" goes to pytest)
# make soak          half an hour of training on several machines with random faults; needs root
# make map           what is where: every module in a line

SHELL := /bin/bash
CUDA ?= 13
JOBS ?= 2
ARGS ?=
export PYTHON
PYTEST := .venv/bin/python -m pytest $(ARGS)

.PHONY: help install install-dev quickstart test test-slow soak check format map clean

help:
	@sed -n 's/^# //p' Makefile

install:
	@tools/install.sh run $(CUDA)

install-dev:
	@tools/install.sh dev $(CUDA)

quickstart: install
	.venv/bin/fathom quickstart --out quickstart

# A file's tests stay in one process, so that its fixtures are made once.
test: install-dev
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install-dev
	$(PYTEST) -m slow --timeout 1800

soak: install-dev
	.venv/bin/python -m tests.end_to_end.soak $(ARGS)

check: install-dev
	.venv/bin/ruff check .
	.venv/bin/mypy

map:
	@python3 tools/house_map.py

format: install-dev
	.venv/bin/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
