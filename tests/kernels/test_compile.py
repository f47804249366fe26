"""Offline compilation for every target: the quick part, and what the committed table says of all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softkv.profiling.compile import TARGETS
from softkv.profiling.matrix import line, page, problems

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "compile_matrix.json"
ROWS: dict[str, dict[str, Any]] = json.loads(COMMITTED.read_text())["rows"]


def _without_interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_as_it_should(target: str) -> None:
    """Shared memory within the limit; no spill, no atomics, no select a score; the target's own matrix instructions."""
    done = _without_interpreter("-m", "softkv.profiling.matrix", "--jobs", "1", "--target", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 10


def test_what_is_compiled_offline_is_what_the_jit_compiles() -> None:
    """The same signature, constants and alignment of every argument."""
    done = _without_interpreter("-m", "tools.jit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-2]) > 200


def test_the_committed_table_is_complete() -> None:
    """Every binary that PLAN names, and none that it doesn't; `make compile-matrix` makes what is missing."""
    names = "from softkv.profiling.matrix import *; print(json.dumps(sorted(wanted(PLAN, list(TARGETS)))))"
    done = _without_interpreter("-c", names)
    assert done.returncode == 0, done.stderr
    assert sorted(ROWS) == json.loads(done.stdout)


def test_no_binary_of_the_committed_table_has_a_problem() -> None:
    found = {key: problems(key, row) for key, row in ROWS.items()}
    assert not {key: bad for key, bad in found.items() if bad}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": 300_000}, "shared memory"),
        ({"atomics": 1}, "atomics"),
        ({"spills": 2}, "2 spills"),
        ({"selects": 64}, "64 selects"),
        ({"matrix": ["HMMA"]}, "not HGMMA"),
        ({"matrix": []}, "no loop with matrix instructions"),
    ],
)
def test_what_counts_as_a_problem(change: dict[str, Any], message: str) -> None:
    key = "forward | causal, shared prefix | sm_90 | 64 | bf16"
    row = ROWS[key]
    assert not problems(key, row)
    bad = row | change
    assert message in "; ".join(problems(key, bad))
    assert message in line(key, bad)
    assert "1 with a problem" in page({key: bad, key.replace("64", "128"): row}, 2)
