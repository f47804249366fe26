"""Any value of any argument: the right result, or one error that names the argument. Nothing in between."""

import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softkv.ops.api import prefix_attention, prefix_attention_varlen
from softkv.ops.reference import reference_attention
from tests.attention_cases import Case, dense, index, packed

NUMBERS = {
    "None": None, "True": True, "False": False, "0": 0, "-1": -1, "1": 1, "3": 3, "2**31": 2**31, "2**63": 2**63,
    "2**70": 2**70, "-2**70": -(2**70), "10**40": 10**40, "0.0": 0.0, "-0.0": -0.0, "0.5": 0.5, "-0.5": -0.5,
    "3.0": 3.0, "1e-300": 1e-300, "1e-45": 1e-45, "1e-20": 1e-20, "1e20": 1e20, "1e38": 1e38, "1e300": 1e300,
    "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "text": "1", "list": [1], "complex": 1j,
    "fraction": fractions.Fraction(1, 2), "float32 of NumPy": np.float32(0.5), "float64 of NumPy": np.float64(0.5),
    "int64 of NumPy": np.int64(3), "bool of NumPy": np.True_, "tensor of an int": torch.tensor(3),
    "tensor of a float": torch.tensor(0.5), "tensor of two": torch.tensor([1, 2]), "function": len,
}  # fmt: skip

# What a refusal's message starts with.
NAMES = {
    "scale": "scale", "softcap": "softcap", "window": "window", "chunk": "chunk", "is_causal": "is_causal",
    "window_covers_prefix": "window_covers_prefix", "return_lse": "return_lse", "backend": "backend",
    "max_seqlen_q": "(max_seqlen|cu_seqlens)_q", "max_seqlen_k": "(max_seqlen|cu_seqlens)_k",
}  # fmt: skip

ACCEPTED = {
    "scale": {"None", "0", "-1", "1", "3", "2**31", "2**63", "2**70", "-2**70", "0.0", "-0.0", "0.5", "-0.5", "3.0",
              "1e-300", "1e-45", "1e-20", "1e20", "float64 of NumPy"},
    "softcap": {"None", "1", "3", "2**31", "2**63", "2**70", "0.5", "3.0", "1e-20", "1e20", "float64 of NumPy"},
    "window": {"None", "1", "3", "2**31", "2**63", "2**70", "10**40"},
    "chunk": {"None", "1", "3", "2**31", "2**63", "2**70", "10**40"},
    "is_causal": {"True", "False"},
    "window_covers_prefix": {"True", "False"},
    "return_lse": {"True", "False"},
    "backend": {"None"},
    "max_seqlen_q": {"2**31", "2**63", "2**70", "10**40"},
    "max_seqlen_k": {"2**31", "2**63", "2**70", "10**40"},
}  # fmt: skip


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """By the oracle, in float64, with numbers that it can compute with."""
    options = {n: min(x, 1000) if n in ("window", "chunk") and x else x for n, x in case.options.items()}
    options = {n: float(x) if n in ("scale", "softcap") and x is not None else x for n, x in options.items()}
    options = {n: x for n, x in options.items() if n not in ("return_lse", "backend")}
    return reference_attention(**{n: x.double() for n, x in case.leaves.items()}, **options)


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_value_of_an_option(option: str, dtype: torch.dtype) -> None:
    in_line = option.startswith("max_seqlen")
    case = (packed([7], P=5, A=1, sinks=True) if in_line else dense(T=7, P=5, A=1, sinks=True)).to(dtype)
    call = prefix_attention_varlen if in_line else prefix_attention
    for name, value in NUMBERS.items():
        arguments: dict[str, Any] = {**case.leaves, **case.options, "return_lse": True, option: value}
        if name not in ACCEPTED[option]:
            with pytest.raises((TypeError, ValueError), match=rf"^{NAMES[option]}: expected .*, got "):
                call(**arguments)
            continue
        results = call(**arguments)
        out = results[0] if isinstance(results, tuple) else results
        changed = Case(case.leaves, {} if in_line or option == "return_lse" else {option: value})
        if in_line:
            rows = {n: x.transpose(0, 1)[None] if n in ("q", "k", "v") else x for n, x in case.leaves.items()}
            want = exact(Case(rows))[0][0].transpose(0, 1)
        else:
            want = exact(changed)[0]
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(
            out.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        if option == "scale" and value is not None and abs(value) > 1e6:
            continue  # of one-hot attention: rounding times the scale
        leaves = list(case.leaves.values())
        direction = torch.randn(want.shape, dtype=torch.float64)
        for got, expected in zip(
            torch.autograd.grad(out, leaves, direction.to(dtype)),
            torch.autograd.grad(want, leaves, direction),
            strict=True,
        ):
            size = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got / size, expected.to(dtype) / size, rtol=10 * tolerance, atol=10 * tolerance)


TENSORS = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_index", "prefix_lengths", "key_mask", "key_lengths", "sinks",
           "cu_seqlens_q", "cu_seqlens_k")  # fmt: skip

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: 3,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.detach().numpy(),
    "a parameter list": lambda x: torch.nn.ParameterList(),
    "complex": lambda x: x.to(torch.complex64),
    "of bytes": lambda x: x.to(torch.uint8),
    "of eight bits": lambda x: x.float().to(torch.float8_e4m3fn),
    "sparse": lambda x: x.detach().to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x.detach(), x.detach()]),
    "nested, jagged": lambda x: torch.nested.nested_tensor([x.detach(), x.detach()], layout=torch.jagged),
    "on another device": lambda x: x.to("meta"),
    "of no dim": lambda x: x.flatten()[0].detach(),
    "of one dim more": lambda x: x[None],
    "of one dim less": lambda x: x[0],
    "one longer": lambda x: torch.cat([x, x[:1]]),
    "empty": lambda x: x[:0],
}


def _full() -> tuple[Case, Case]:
    rows = dense(
        B=3, T=5, P=7, A=2, sinks=True, prefix_index=index(0, 1, -1), prefix_lengths=index(7, 3),
        key_mask=torch.ones(3, 5, dtype=torch.bool), key_lengths=index(5, 4, 5),
    )  # fmt: skip
    return rows, packed([3, 2, 4], P=7, A=2, sinks=True, prefix_index=index(0, 1, -1), prefix_lengths=index(7, 3))


@pytest.mark.parametrize("operand", TENSORS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_refused(operand: str, wrong: str) -> None:
    case = _full()[operand.startswith("cu_")]
    arguments = {**case.leaves, **case.options}
    call = prefix_attention_varlen if case.packed else prefix_attention
    changed = WRONG[wrong](arguments[operand])
    # Where a neighbour was changed alone, the message may name that one.
    with pytest.raises(
        (TypeError, ValueError), match=r"^(q|k|v|heads|prefix_?\w*|key_\w+|sinks|cu_seqlens_\w): expected "
    ):
        call(**{**arguments, operand: changed})


EMPTY = {
    "no row": lambda: dense(B=0, T=3, P=4, A=1, sinks=True),
    "no row, a prefix a row": lambda: dense(B=0, T=3, P=4, A=0),
    "no query": lambda: dense(T=0, S=4, P=4, A=1, window=3),
    "no key": lambda: dense(T=3, S=0, P=4, A=1, chunk=2),
    "no key, no slot": lambda: dense(T=3, S=0, P=0, A=1, sinks=True),
    "no slot": lambda: dense(T=3, P=0, A=1, window=2, window_covers_prefix=True),
    "no slot, bank": lambda: dense(T=3, P=0, A=3, prefix_index=index(2, -1), prefix_lengths=index(0, 0, 0)),
    "no head": lambda: dense(H=0, P=4, A=1),
    "no row of a line": lambda: packed([0], P=4, A=1),
    "no query of a line": lambda: packed([0, 0], [3, 2], P=4, A=1),
    "no key of a line": lambda: packed([3, 2], [0, 0], P=4, A=1, sinks=True),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("width", [None, 5], ids=["Dv = D", "Dv = 5"])
def test_empty_operands(name: str, width: int | None) -> None:
    case = EMPTY[name]()
    if width:
        case.leaves |= {n: case.leaves[n].detach()[..., :width].requires_grad_() for n in ("v", "prefix_v")}
    got, want = case.run(), case.run("reference")
    for key, expected in want.items():
        assert got[key].shape == expected.shape
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-11)


def test_an_empty_bank() -> None:
    """No prefix at all, and rows that read none."""
    case = dense(T=3)
    nothing = {n: torch.zeros(0, 2, 4, 16, dtype=torch.float64) for n in ("prefix_k", "prefix_v")}
    for backend in (None, "reference"):
        out = prefix_attention(**case.leaves, **nothing, prefix_index=index(-1, -1), backend=backend)
        torch.testing.assert_close(out, case.call()[0])


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": -0.5}], ids=str)
def test_autocast_lowers_nothing_inside(options: dict) -> None:
    case = dense(T=20, P=5, A=1, **options).to(torch.float32)
    want = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert all(torch.equal(got[n], want[n]) for n in want)
