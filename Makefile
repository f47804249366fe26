# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test bench lint compile-matrix mutants clean docs

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks.demo main

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS)

# softkv beside what it replaces: tables, plots and runs/bench/report.html (about 22 minutes on 2 cores).
bench: $(READY)
	$(BIN)/softkv bench attention --seconds 0.3
	$(BIN)/softkv bench generate --rounds 2 --case P64 --case P1024 --case P2048
	$(BIN)/softkv bench train --steps 1
	$(BIN)/softkv bench adapters --seconds 0 --case generation-16

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel for every target: registers, spills, shared memory, occupancy (minutes; goes on where it stopped).
compile-matrix: $(READY)
	$(BIN)/python -m softkv.kernels.compile --all --write benchmarks/results/compile_matrix.json --table docs/compile_matrix.md

# Breaks the kernels on purpose, one line at a time: every mutant must be caught (about 10 minutes).
mutants: $(READY)
	$(BIN)/python -m tests.kernels.mutate --write docs/kernel_mutants.md

# The documentation as a site, in build/site.
docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .cache build *.egg-info
