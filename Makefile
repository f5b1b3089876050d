# Each target works on a fresh clone: it makes .venv, and installs what it needs, once.
PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check bench docs clean

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=…") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.installed ## from files to verdict on real handwritten digits
	$(BIN)/finetune fit sklearn:digits --out runs/demo
	@echo "the report: runs/demo/report.html"

test: .venv/.installed ## the whole suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/.installed ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.installed ## the slow tests, and the quick form of every benchmark
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/run.py --quick

docs: .venv/.installed ## the pages of docs that are made from the code
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_architectures.py

clean:
	rm -rf .venv .peers build dist *.egg-info
