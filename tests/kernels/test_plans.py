"""Launch plans: a later call goes past Triton's JIT, and a plan never outlives what it depends on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softkv.kernels import plans
from tests.attention_cases import Case, dense, index, packed
from tests.kernels.device import on_device
from tests.kernels.plans_in_use import CHECKS


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.plans_in_use"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_with_a_stand_in_for_the_driver(name: str, said: dict[str, str]) -> None:
    assert not said[name], said[name]


# Alike in all but what a plan must tell apart: values, lengths, strides, options, prefixes, packing, what is asked for.
CALLS: dict[str, Callable[[], Case]] = {
    "plain": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16),
    "other values": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, seed=1),
    "longer": lambda: dense(B=1, H=2, G=1, T=5, S=7, P=3, A=1, D=16),
    "not causal": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, is_causal=False),
    "window": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, window=2),
    "window over the prefix": lambda: dense(
        B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, window=2, window_covers_prefix=True
    ),
    "softcap": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, softcap=1.5),
    "scale below 0": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, scale=-0.2),
    "lengths": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, key_lengths=index(5)),
    "other lengths": lambda: dense(B=1, H=2, G=1, T=5, S=6, P=3, A=1, D=16, key_lengths=index(6)),
    "bank": lambda: dense(B=2, H=2, G=1, T=3, S=4, P=3, A=2, D=16, prefix_index=index(1, -1)),
    "the bank by another index": lambda: dense(B=2, H=2, G=1, T=3, S=4, P=3, A=2, D=16, prefix_index=index(0, 1)),
    "packed": lambda: packed([3, 2], [3, 2], H=2, G=1, P=3, A=1, D=16),
    "packed otherwise": lambda: packed([2, 3], [2, 3], H=2, G=1, P=3, A=1, D=16),
}


def bits(name: str, half: bool) -> dict[str, torch.Tensor]:
    return on_device(CALLS[name]()).to(torch.float16 if half else torch.float32).run("triton")


@given(st.lists(st.tuples(st.sampled_from(sorted(CALLS)), st.booleans()), min_size=6, max_size=6))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_calls_in_any_order_give_the_same_bits_as_without_plans(calls: list[tuple[str, bool]]) -> None:
    with_plans = [bits(*call) for call in calls]
    assert plans._kept
    for call, got in zip(calls, with_plans, strict=True):
        plans._kept.clear()
        want = bits(*call)
        assert all(torch.equal(got[name], want[name]) for name in want), call
