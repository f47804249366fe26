"""Offline compilation for every target: the quick part, and what the committed table says of all."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from softkv.kernels.compile import TARGETS
from softkv.kernels.matrix import line, page, problems

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "compile_matrix.json"
KERNELS = ("forward", "prepare", "dq", "dkv", "dkv over the prefix", "decode", "merge")
ROWS: dict[str, dict[str, Any]] = json.loads(COMMITTED.read_text())["rows"]


def _without_interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_as_it_should(target: str) -> None:
    """Shared memory within the limit; no spill, no atomics, no select a score; the target's own matrix instructions."""
    done = _without_interpreter("-m", "softkv.kernels.compile", "--jobs", "1", "--target", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 10


def test_what_is_compiled_offline_is_what_the_jit_compiles() -> None:
    """The same signature, constants and alignment of every argument."""
    done = _without_interpreter("-m", "tests.kernels.jit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-2]) > 300


def test_the_committed_table_holds_every_kernel_and_target() -> None:
    """Every kernel and target, at least at D = 64 in bf16; what else PLAN names, `make compile-matrix` adds."""
    keys = (key.split(" | ") for key in ROWS)
    found = {(kernel, target) for kernel, _, target, D, dtype in keys if (D, dtype) == ("64", "bf16")}
    assert not set(itertools.product(KERNELS, TARGETS)) - found


def test_no_common_binary_of_the_committed_table_has_a_problem() -> None:
    """The rarer flag sets may: the table shows which, and docs/kernels.md says so."""
    common = ("causal, shared prefix", "decode, shared prefix")
    found = {key: problems(key, row) for key, row in ROWS.items() if key.split(" | ")[1] in common}
    assert len(found) > 60
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
