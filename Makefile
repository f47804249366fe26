# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Any Python from 3.10 on will do; the first of these that runs is taken.
works = $(shell $(1) -c 'import sys; print("$(1)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)
PYTHON ?= $(firstword $(foreach python,python3.11 python3 python3.12 python3.13 python3.10 python,$(call works,$(python))))
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test fuzz threads soak bench learning gpu lint pins constraints compile-matrix mutants models docs clean

$(READY): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "softkv needs Python 3.10 or newer, and none was found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks.demo main

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS)

# Random calls of SoftModel.forward beside rows that are really concatenated (`make test` runs a part).
fuzz: $(READY)
	OMP_NUM_THREADS=1 SOFTKV_DRAWS=2000 $(BIN)/python -m pytest tests/robustness/test_fuzz.py -n $(WORKERS)

# What is safe from several threads (the table in docs/adapters.md), a thousand rounds of each row.
threads: $(READY)
	OMP_NUM_THREADS=1 SOFTKV_ROUNDS=1000 $(BIN)/python -m pytest tests/robustness/test_threads.py

# Threads, saves and interrupts for half an hour: answers as of one thread, memory flat.
soak: $(READY)
	OMP_NUM_THREADS=1 SOFTKV_ROUNDS=1000 SOFTKV_POINTS=400 $(BIN)/python -m pytest tests/robustness
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak --minutes 30

# softkv beside what it replaces: tables, plots and runs/bench/report.html (about 22 minutes on 2 cores).
bench: $(READY)
	$(BIN)/softkv bench attention --seconds 0.3
	$(BIN)/softkv bench generate --rounds 2 --case P64 --case P1024 --case P2048
	$(BIN)/softkv bench train --steps 1
	$(BIN)/softkv bench adapters --seconds 0 --case generation-16

# How well the methods learn, beside PEFT's: docs/learning.md. Goes on where it stopped (hours on 2 cores; QUICK=--quick: ten
# minutes).
learning: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning $(QUICK)
	$(BIN)/python -m benchmarks.learning_report
	$(BIN)/python -m benchmarks.readme

# Everything a GPU can tell, in ten minutes; goes on where it stopped. Table: runs/gpu/table.md.
gpu: $(READY)
	$(BIN)/softkv bench gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Do the pins resolve from the package index alone, for this Python?
pins:
	.ci/pins $(PYTHON)

# The pins, for every Python and platform at once: what is pinned stays, unless it is deleted from the file first.
constraints: $(READY)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version 3.10 --extra dev --extra peers --no-annotate \
		--custom-compile-command "make constraints" setup.py -o constraints.txt

# Every kernel for every target: registers, spills, shared memory, occupancy (minutes; goes on where it stopped).
compile-matrix: $(READY)
	$(BIN)/python -m softkv.profiling.matrix --all --write benchmarks/results/compile_matrix.json --table docs/compile_matrix.md

# Breaks the kernels on purpose, one line at a time: every mutant must be caught (about 10 minutes).
mutants: $(READY)
	$(BIN)/python -m tools.mutate --write docs/kernel_mutants.md

# Every model of transformers' mappings, tiny and random, with every method: docs/models.md. Goes on where it
# stopped (about 40 minutes).
models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.models

# The documentation as a site, in build/site.
docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info
