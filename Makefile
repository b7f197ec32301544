# `make quickstart` and `make test` are complete by themselves; both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS = requirements/constraints.txt

.PHONY: help install quickstart paper-tables test crash-test gpu-report lint docs dist

help:
	@echo "make quickstart  train, evaluate and draw on the embedded data, about 5 minutes on 2 cores"
	@echo "make paper-tables  measure Tables 1 and 2 of the paper, about a minute"
	@echo "make test        run the test suite"
	@echo "make crash-test  kill and resume a training dozens of times, compare: about 8 minutes"
	@echo "make gpu-report  measure all that a GPU has to show, into gpu-report/, in 10 minutes"
	@echo "make lint        check style with ruff"
	@echo "make docs        build the documentation into site/; a warning is an error"
	@echo "make dist        build the wheel and the sdist into dist/"
	@echo "make install     make $(VENV) with all packages; the others do it by themselves"
	@echo "PYTHON=python3.12 chooses the interpreter, OPTS='KEY VALUE ...' overrides the config."

install: $(VENV)/installed

$(VENV)/installed: setup.py $(wildcard requirements/*.txt) tools/install_detectron2.sh
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "error: gn_practical needs Python 3.10 to 3.13, and $(PYTHON) is" \
	         "$$($(PYTHON) --version 2>&1). Choose another: make install PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) torch torchvision
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable '.[all]'
	PYTHON=$(BIN)/python PIP_CONSTRAINT=$(CONSTRAINTS) sh tools/install_detectron2.sh
	touch $@

# Threads wait for each other in a short loop: in a long one they stall when a core is taken.
quickstart: install
	GOMP_SPINCOUNT=50000 $(BIN)/python tools/train_net.py --config-file configs/quickstart/pfpn.yaml $(OPTS)

paper-tables: install
	$(BIN)/python projects/paper_tables/reproduce_table1.py
	$(BIN)/python projects/paper_tables/reproduce_table2.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(OPTS)

crash-test: install
	$(BIN)/python tests/crash_test.py $(OPTS)

# Installs nothing, for machines without a network: .venv where it is, else PYTHON's packages.
gpu-report:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_report.py $(OPTS)

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

docs: install
	$(BIN)/python -m mkdocs build --strict

dist: install
	$(BIN)/python -m build --no-isolation
