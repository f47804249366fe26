"""One clear error for each call that cannot be meant: what was expected, what came."""

# ruff: noqa: E501

import pytest
import torch
from torch.autograd import forward_ad

from softkv.ops.api import prefix_attention_varlen
from tests.attention_cases import Case, dense, index, packed


def _with(case: Case, **changes: object) -> Case:
    leaves = {**case.leaves, **{n: x for n, x in changes.items() if n in case.leaves}}
    return Case(leaves, case.options | {n: x for n, x in changes.items() if n not in case.leaves})


def _rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


# B = 2, H = 4, G = 2, T = S = 5, P = 7, D = 16
DENSE = {
    "q of five dims": ({"q": _rand(1, 2, 4, 5, 16)}, ValueError, r"q: expected 4 dims \[B, H, T, D\], got \[1, 2, 4, 5, 16\]"),
    "no k": ({"k": None}, TypeError, r"k: expected a tensor, got NoneType"),
    "q of integers": ({"q": torch.ones(2, 4, 5, 16).long()}, TypeError, r"q: expected float16.*got torch.int64"),
    "k of another D": ({"k": _rand(2, 2, 5, 8)}, ValueError, r"k: expected \[B, G, S, D\] with D = 16, got \[2, 2, 5, 8\]"),
    "k of three dims": ({"k": _rand(2, 5, 16)}, ValueError, r"k: expected \[B, G, S, D\]"),
    "k of another dtype": ({"k": _rand(2, 2, 5, 16).float()}, TypeError, r"k: expected the dtype of q, torch.float64, got torch.float32"),
    "k on another device": ({"k": _rand(2, 2, 5, 16).to("meta")}, ValueError, r"k: expected the device of q, cpu, got meta"),
    "k of another batch": ({"k": _rand(3, 2, 5, 16), "v": _rand(3, 2, 5, 16)}, ValueError, r"k: expected the batch of q, 2 rows, got 3"),
    "v unlike k": ({"v": _rand(2, 2, 4, 16)}, ValueError, r"v: expected the shape of k, \[2, 2, 5, 16\], but for the last dim, got \[2, 2, 4, 16\]"),
    "H no multiple of G": ({"k": _rand(2, 3, 5, 16), "v": _rand(2, 3, 5, 16)}, ValueError, r"heads: expected .* got H = 4, G = 3"),
    "no key heads": ({"k": _rand(2, 0, 5, 16), "v": _rand(2, 0, 5, 16)}, ValueError, r"heads: expected"),
    "prefix of other heads": ({"prefix_k": _rand(1, 4, 7, 16)}, ValueError, r"prefix_k: expected \[A, G, P, D\] with G = 2, D = 16, got \[1, 4, 7, 16\]"),
    "prefix of another dtype": ({"prefix_v": _rand(1, 2, 7, 16).half()}, TypeError, r"prefix_v: expected the dtype of q"),
    "prefix on another device": ({"prefix_v": _rand(1, 2, 7, 16).to("meta")}, ValueError, r"prefix_v: expected the device of q"),
    "prefix values unlike keys": ({"prefix_v": _rand(1, 2, 6, 16)}, ValueError, r"prefix_v: expected the A = 1 and P = 7 of prefix_k, got"),
    "prefix keys alone": ({"prefix_v": None}, ValueError, r"prefix: expected prefix_k and prefix_v together, got only prefix_k"),
    "A neither 1 nor B": ({"prefix_k": _rand(3, 2, 7, 16), "prefix_v": _rand(3, 2, 7, 16)}, ValueError, r"expected A = 1 or one prefix a row, 2, .* got A = 3"),
    "index of another length": ({"prefix_index": index(0)}, ValueError, r"prefix_index: expected \[2\], got \[1\]"),
    "index of floats": ({"prefix_index": torch.zeros(2)}, TypeError, r"prefix_index: expected torch.int32 or torch.int64, got torch.float32"),
    "index on another device": ({"prefix_index": torch.zeros(2, device="meta").int()}, ValueError, r"prefix_index: expected the device of q"),
    "index as a list": ({"prefix_index": [0, 0]}, TypeError, r"prefix_index: expected a tensor, got list"),
    "index past the bank": ({"prefix_index": index(0, 1)}, ValueError, r"prefix_index: expected values from -1 to 0, got 1"),
    "index below −1": ({"prefix_index": index(0, -2)}, ValueError, r"prefix_index: expected values from -1 to 0, got -2"),
    "prefix length past P": ({"prefix_lengths": index(8)}, ValueError, r"prefix_lengths: expected values from 0 to 7, got 8"),
    "prefix lengths a row": ({"prefix_lengths": index(7, 7)}, ValueError, r"prefix_lengths: expected \[1\], got \[2\]"),
    "mask of numbers": ({"key_mask": torch.ones(2, 5)}, TypeError, r"key_mask: expected torch.bool, got torch.float32"),
    "mask of another shape": ({"key_mask": torch.ones(2, 6).bool()}, ValueError, r"key_mask: expected \[B, S\] = \[2, 5\], got \[2, 6\]"),
    "mask on another device": ({"key_mask": torch.ones(2, 5, device="meta").bool()}, ValueError, r"key_mask: expected the device of q"),
    "key length past S": ({"key_lengths": index(5, 6)}, ValueError, r"key_lengths: expected values from 0 to 5, got 6"),
    "key length below 0": ({"key_lengths": index(5, -1)}, ValueError, r"key_lengths: expected values from 0 to 5, got -1"),
    "scale of NaN": ({"scale": float("nan")}, ValueError, r"scale: expected a finite number up to 1e\+30, or None for D\^-0.5, got nan"),
    "window of a part": ({"window": 2.5}, TypeError, r"window: expected an int, got 2.5"),
    "window of nothing": ({"window": 0}, ValueError, r"window: expected at least 1, or None, got 0"),
    "window without causality": ({"window": 3, "is_causal": False}, ValueError, r"window: expected is_causal=True with it, got 3 with is_causal=False"),
    "chunk of nothing": ({"chunk": 0}, ValueError, r"chunk: expected at least 1, or None, got 0"),
    "chunk without causality": ({"chunk": 3, "is_causal": False}, ValueError, r"chunk: expected is_causal=True with it, got 3"),
    "chunk with a window": ({"chunk": 3, "window": 2}, ValueError, r"chunk: expected no window with it, got chunk=3 and window=2"),
    "values of another width than the prefix's": ({"v": _rand(2, 2, 5, 8)}, ValueError, r"prefix_v: expected \[A, G, P, Dv\] with G = 2, Dv = 8, got \[1, 2, 7, 16\]"),
    "values of no width": ({"v": _rand(2, 2, 5, 0)}, ValueError, r"heads: expected D ≥ 1, Dv ≥ 1 .* Dv = 0"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, r"softcap: expected a number above 0, from .* or None, got 0.0"),
    "sinks of another length": ({"sinks": _rand(3)}, ValueError, r"sinks: expected \[H\] = \[4\], got \[3\]"),
    "sinks of integers": ({"sinks": torch.ones(4).long()}, TypeError, r"sinks: expected float16.*got torch.int64"),
    "sinks on another device": ({"sinks": _rand(4).to("meta")}, ValueError, r"sinks: expected the device of q"),
    "triton without a GPU": ({"backend": "triton"}, RuntimeError, r"backend 'triton': expected a CUDA or ROCm tensor, or TRITON_INTERPRET=1, got cpu"),
    "unknown backend": ({"backend": "fast"}, ValueError, r"backend: expected None or one of torch, triton, cudnn, flash, reference, got 'fast'"),
}  # fmt: skip

# rows of 2 and 3 tokens
PACKED = {
    "k of another D": ({"k": _rand(5, 2, 8)}, ValueError, r"k: expected \[M, G, D\] with D = 16"),
    "ends as a list": ({"cu_seqlens_q": [0, 2, 5]}, TypeError, r"cu_seqlens_q: expected a tensor, got list"),
    "ends of int64": ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, r"cu_seqlens_q: expected torch.int32, got torch.int64"),
    "ends of two dims": ({"cu_seqlens_q": index(0, 2, 5)[None]}, ValueError, r"cu_seqlens_q: expected \[B \+ 1\], got \[1, 3\]"),
    "no ends": ({"cu_seqlens_q": index()}, ValueError, r"cu_seqlens_q: expected \[B \+ 1\], got \[0\]"),
    "as many rows of keys": ({"cu_seqlens_k": index(0, 5)}, ValueError, r"cu_seqlens_k: expected \[3\], got \[2\]"),
    "ends on another device": ({"cu_seqlens_k": index(0, 2, 5).to("meta")}, ValueError, r"cu_seqlens_k: expected the device of q"),
    "ends that decrease": ({"cu_seqlens_q": index(0, 6, 5)}, ValueError, r"cu_seqlens_q: expected row lengths from 0 to max_seqlen = 3, got 6"),
    "ends that start late": ({"cu_seqlens_q": index(1, 2, 5)}, ValueError, r"cu_seqlens_q: expected it to start at 0 and end at 5, got 1 and 5"),
    "ends that stop early": ({"cu_seqlens_k": index(0, 2, 4)}, ValueError, r"cu_seqlens_k: expected it to start at 0 and end at 5, got 0 and 4"),
    "no max_seqlen": ({"max_seqlen_q": None}, TypeError, r"max_seqlen_q: expected an int, got None"),
    "a row too long": ({"max_seqlen_k": 2}, ValueError, r"cu_seqlens_k: expected row lengths from 0 to max_seqlen = 2, got 3"),
    "index of another length": ({"prefix_index": index(0)}, ValueError, r"prefix_index: expected \[2\], got \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkv.kernels.interpreter_enabled", lambda: False)  # other tests may have turned it on
    changes, error, message = DENSE[name]
    with pytest.raises(error, match=message):
        _with(dense(P=7, A=1), **changes).call()


@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str) -> None:
    changes, error, message = PACKED[name]
    with pytest.raises(error, match=message):
        _with(packed([2, 3], P=7, A=1), **changes).call()


def test_packed_queries_of_four_dims() -> None:
    case, ends = dense(P=7, A=1), index(0, 2, 5)
    with pytest.raises(ValueError, match=r"q: expected 3 dims \[N, H, D\], got \[2, 4, 5, 16\]"):
        prefix_attention_varlen(**case.leaves, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=3, max_seqlen_k=3)


def test_values_are_not_read_off_the_cpu() -> None:
    """On a GPU a check of values would wait for the device; here the meta device stands for it."""
    case = _with(dense(P=7, A=1), prefix_index=index(0, 9), key_lengths=index(5, 99))
    for name, x in case.leaves.items():
        case.leaves[name] = x.to("meta")
    case.options = {name: x.to("meta") for name, x in case.options.items()}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out, lse = case.call()
        assert out.shape == (2, 4, 5, 16)
        assert lse.shape == (2, 4, 5)


def test_double_backward() -> None:
    case = dense(P=7, A=1)
    out, _ = case.call()
    (grad,) = torch.autograd.grad(out.square().sum(), case.leaves["prefix_k"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_function_transforms(transform: object) -> None:
    case = dense(P=7, A=1)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        transform(lambda k: _with(case, prefix_k=k).call()[0].sum())(
            case.leaves["prefix_k"][None] if transform is torch.func.vmap else case.leaves["prefix_k"]
        )


def test_a_transform_of_options_alone() -> None:
    case = dense(P=7, A=1)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        torch.func.vmap(lambda x: _with(case, prefix_index=x).call()[0])(torch.zeros(3, 2).int())


def test_bfloat16_in_the_interpreter_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """There its products are of raw 16-bit integers: wrong by 1e8, without a word."""
    monkeypatch.setattr("softkv.kernels.interpreter_enabled", lambda: True)
    monkeypatch.setattr("softkv.kernels.forward", lambda q, *rest, **options: (q, q[..., 0].float()))
    with pytest.warns(UserWarning, match="interpreter computes bfloat16 incorrectly"):
        dense(P=7, A=1).to(torch.bfloat16).call(backend="triton")


def test_forward_mode() -> None:
    case = dense(P=7, A=1)
    k = case.leaves["prefix_k"]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        _with(case, prefix_k=forward_ad.make_dual(k, torch.ones_like(k))).call()
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        torch.func.jvp(lambda x: _with(case, prefix_k=x).call()[0], (k,), (torch.ones_like(k),))


def test_the_reference_differentiates_twice() -> None:
    case = dense(B=1, H=1, G=1, T=2, P=2, D=2, A=1)
    assert torch.autograd.gradgradcheck(
        lambda *x: Case(dict(zip(case.leaves, x, strict=True))).call(backend="reference"), tuple(case.leaves.values())
    )
