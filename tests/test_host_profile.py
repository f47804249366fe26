"""`softkv profile host`, and the driver that launches nothing: in processes whose kernels are not interpreted."""

import json
import os
import subprocess
import sys

import pytest

COUNT = """
import json, torch, softkv
from softkv.ops.operator import load_engine
from softkv.profiling.no_device import no_device
from triton.runtime.driver import driver
load_engine("triton")
shapes = ((2, 24), (1, 24), (1, 24), (1, 4), (1, 4))
leaves = [torch.randn(1, heads, length, 16, requires_grad=True) for heads, length in shapes]
said = []
before = driver._active
for target in ("sm_90", "sm_80"):
    with no_device(target) as counts:
        for _ in range(2):
            softkv.prefix_attention(*leaves, backend="triton").sum().backward()
    said.append(counts)
assert driver._active is before
try:
    softkv.prefix_attention(*leaves, backend="triton")
except RuntimeError as refusal:
    said.append(str(refusal))
print(json.dumps(said))
"""


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_stage_and_both_ways_are_measured() -> None:
    records = json.loads(run("-m", "softkv.cli", "profile", "host", "--device", "cpu", "--calls", "15", "--json"))
    assert [record["mode"] for record in records] == ["forward", "forward + backward", "decoding"]
    for record in records:
        assert list(record["stages"]) == ["front door", "operator", "plan", "launch"]
        assert record["call"] > 0
        assert record["sdpa"] > 0
        assert record["ratio"] > 0
        assert sum(record["stages"].values()) >= 0.99 * record["call"]


def test_launches_are_counted_and_nothing_stays() -> None:
    """Twice as many launches in two calls as kernels in one; afterwards a CPU tensor is refused as before."""
    first, second, refusal = json.loads(run("-c", COUNT))
    assert first == second
    assert first["forward"] == 2
    assert all(count % 2 == 0 for count in first.values())
    assert "expected a CUDA or ROCm tensor" in refusal


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import softkv.kernels as engine
    from softkv.profiling.no_device import no_device

    monkeypatch.setattr(engine, "interpreter_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET to be unset"), no_device():
        pass
