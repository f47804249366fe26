"""Which engine serves calls that name none on a GPU: rows of data, only for calls that every library kernel takes."""

from typing import Any

import pytest
import torch

from softkv.ops import choice
from softkv.ops.choice import MeasuredRow, engine_for
from softkv.ops.engine import Call

ROWS = (
    MeasuredRow("a GPU", gradients=False, head_dim=16, tokens=64, slots=0, work=0, engine="cudnn", measured="today"),
    MeasuredRow("a GPU", gradients=True, head_dim=16, tokens=32, slots=8, work=500, engine="flash", measured="today"),
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MEASURED", ROWS)
    monkeypatch.setattr(choice, "_name_of", lambda device: "a GPU")


def call(
    T: int = 64, P: int = 8, B: int = 2, learned: bool = False, dtype: Any = torch.bfloat16, **changes: Any
) -> Call:
    q, k, v = (torch.empty(B, heads, T, 16, dtype=dtype) for heads in (4, 2, 2))
    prefix = [torch.empty(1, 2, P, 16, dtype=dtype, requires_grad=learned) if P else None for _ in "kv"]
    nothing: Any = dict.fromkeys(Call.__annotations__)
    given = {"q": q, "k": k, "v": v, "prefix_k": prefix[0], "prefix_v": prefix[1], "scale": 0.25, "is_causal": True}
    return nothing | given | {"window_covers_prefix": False} | changes


def test_until_something_is_measured_all_calls_are_tritons() -> None:
    assert choice.MEASURED == ()
    assert engine_for(call()) == "triton"


def test_the_first_row_that_fits_is_taken(measured: None) -> None:
    assert engine_for(call()) == "cudnn"
    assert engine_for(call(P=0)) == "cudnn"
    assert engine_for(call(T=63)) == "triton"
    assert engine_for(call(learned=True)) == "flash"
    assert engine_for(call(learned=True, P=4)) == "triton"
    assert engine_for(call(learned=True, T=32, B=1)) == "triton"  # too little work
    with torch.no_grad():
        assert engine_for(call(learned=True)) == "cudnn"


def test_rows_are_of_one_device(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_name_of", lambda device: "another")
    assert engine_for(call()) == "triton"


SPECIAL: dict[str, dict[str, Any]] = {
    "another dtype": {"dtype": torch.float32},
    "a bank": {"prefix_index": torch.zeros(2, dtype=torch.int32)},
    "lengths": {"prefix_lengths": torch.ones(1, dtype=torch.int32)},
    "padding": {"key_mask": torch.ones(2, 64, dtype=torch.bool)},
    "a cache": {"key_lengths": torch.ones(2, dtype=torch.int32)},
    "packed rows": {"q": torch.empty(128, 4, 16, dtype=torch.bfloat16)},
    "a window": {"window": 4},
    "chunks": {"chunk": 4},
    "a cap": {"softcap": 4.0},
    "a negative scale": {"scale": -1.0},
    "fewer queries than keys": {"k": torch.empty(2, 2, 99, 16, dtype=torch.bfloat16)},
    "wider values": {"v": torch.empty(2, 2, 64, 32, dtype=torch.bfloat16)},
    "one slot": {"P": 1},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_a_library_kernel_does_not_take_is_tritons(name: str, measured: None) -> None:
    assert engine_for(call(**SPECIAL[name])) == "triton"
