"""The engines made of library kernels: split, merge and dispatch, against stand-ins with the libraries' contracts.

A stand-in computes one part in float64 from the same arguments: flash-attn's documented signatures (2.7), and torch's
operators, whose real schemas and meta kernels are asked beside it.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from softkv.ops.library import flash, merge, parts
from tests.attention_cases import CASES, Case, dense, packed
from tests.kernels.device import DEVICE, on_device


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: int, softcap: float) -> tuple[Tensor, Tensor]:
    """(s [H, T, S] fp64 with −∞ where hidden, ds/d(q kᵀ)) of one row: q [T, H, D], k [S, H, D]."""
    s = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    slope = torch.full_like(s, scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        slope = scale * (1 - (s / softcap) ** 2)
    T, S = s.shape[1:]
    at, keys = torch.arange(T, device=q.device)[:, None] + S - T, torch.arange(S, device=q.device)
    hidden = (keys > at) if causal else torch.zeros(T, S, dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden = hidden | (keys < at - left)
    return s.masked_fill(hidden, float("-inf")), slope


def row_forward(q, k, v, scale, causal, left, softcap):
    repeat = q.shape[1] // k.shape[1]
    s, _ = scores(q, k.repeat_interleave(repeat, 1), scale, causal, left, softcap)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:2], float("-inf"))
    p = torch.where(s == float("-inf"), 0.0, torch.exp(s - lse[..., None]))
    out = torch.einsum("hts,shd->thd", p, v.repeat_interleave(repeat, 1).double())
    return out.to(q.dtype), lse.masked_fill(lse == float("-inf"), float("inf")).float()


def row_backward(dout, q, k, v, out, lse, scale, causal, left, softcap):
    repeat, G = q.shape[1] // k.shape[1], k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(repeat, 1).double() for x in (k, v))
    s, slope = scores(q, wide_k, scale, causal, left, softcap)
    p = torch.exp(s - lse.double()[..., None])  # as the kernels do: an lse of −∞ would give NaN
    delta = (dout.double() * out.double()).sum(-1).T
    ds = p * (torch.einsum("thd,shd->hts", dout.double(), wide_v) - delta[..., None]) * slope
    dk = torch.einsum("hts,thd->shd", ds, q.double()).unflatten(1, (G, repeat)).sum(2)
    dv = torch.einsum("hts,thd->shd", p, dout.double()).unflatten(1, (G, repeat)).sum(2)
    return torch.einsum("hts,shd->thd", ds, wide_k), dk, dv


def stand_in() -> types.ModuleType:
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def cut(lengths, *tensors):
        return zip(*(torch.tensor_split(x, lengths[1:-1].tolist()) for x in tensors), strict=True)

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        rows = [row_forward(*x, softmax_scale, causal, window_size_left, softcap) for x in zip(q, k, v, strict=True)]
        return torch.stack([o for o, _ in rows]), torch.stack([x for _, x in rows]), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        for b in range(len(q)):
            grads = row_backward(
                dout[b], q[b], k[b], v[b], out[b], softmax_lse[b], softmax_scale, causal, window_size_left, softcap
            )
            for into, x in zip((dq, dk, dv), grads, strict=True):
                into[b] = x

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        cuts = zip(cut(cu_seqlens_q, q), cut(cu_seqlens_k, k, v), strict=True)
        rows = [row_forward(*a, *b, softmax_scale, causal, window_size_left, softcap) for a, b in cuts]
        return torch.cat([o for o, _ in rows]), torch.cat([x for _, x in rows], 1), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        queries = cut(cu_seqlens_q, dout, q, out, softmax_lse.T, dq)
        for (do, q_, o, lse, into_q), (k_, v_, into_k, into_v) in zip(
            queries, cut(cu_seqlens_k, k, v, dk, dv), strict=True
        ):
            grads = row_backward(do, q_, k_, v_, o, lse.T, softmax_scale, causal, window_size_left, softcap)
            for into, x in zip((into_q, into_k, into_v), grads, strict=True):
                into.copy_(x)

    for function in (
        _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    return module


def cuts(cu_q: Tensor | None, cu_k: Tensor | None, of_q: tuple, of_k: tuple) -> Iterator[tuple]:
    """Rows of operands laid out token by token: dense, or packed with cu_seqlens."""
    if cu_q is None:
        yield from zip(*of_q, *of_k, strict=True)
        return
    assert cu_k is not None
    rows = ((torch.tensor_split(x, cu[1:-1].tolist())) for cu, xs in ((cu_q, of_q), (cu_k, of_k)) for x in xs)
    yield from zip(*rows, strict=True)


def aten_flash() -> dict[str, Callable[..., Any]]:
    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        left = -1 if window_size_left is None else window_size_left
        done = [
            row_forward(q, k, v, scale, is_causal, left, 0.0)
            for q, k, v in cuts(cum_seq_q, cum_seq_k, (query,), (key, value))
        ]
        join = torch.stack if cum_seq_q is None else torch.cat
        lse = torch.stack([x for _, x in done]) if cum_seq_q is None else torch.cat([x for _, x in done], 1)
        return join([out for out, _ in done]), lse, None, None, None

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert logsumexp.is_contiguous()
        left = -1 if window_size_left is None else window_size_left
        by_token = logsumexp.transpose(-1, -2)
        done = [
            row_backward(do, q, k, v, o, lse.T, scale, is_causal, left, 0.0)
            for do, q, o, lse, k, v in cuts(cum_seq_q, cum_seq_k, (grad_out, query, out, by_token), (key, value))
        ]
        join = torch.stack if cum_seq_q is None else torch.cat
        return tuple(join([grads[i] for grads in done]).to(query.dtype) for i in range(3))

    return {"_flash_attention_forward": forward, "_flash_attention_backward": backward}


def aten_cudnn(statistics_dims: int) -> dict[str, Callable[..., Any]]:
    """torch returns statistics [B, H, T] or [B, H, T, 1], as the version has it, and takes back the same."""

    def forward(
        query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
        scale=None,
    ):  # fmt: skip
        assert compute_log_sumexp
        rows = zip(*(x.transpose(1, 2) for x in (query, key, value)), strict=True)
        done = [row_forward(*row, scale, is_causal, -1, 0.0) for row in rows]
        lse = torch.stack([x for _, x in done])
        lse = lse if statistics_dims == 3 else lse[..., None]
        return torch.stack([out for out, _ in done]).transpose(1, 2), lse, *[None] * 7

    def backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
        max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        assert logsumexp.dim() == statistics_dims
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        lse = logsumexp.reshape(query.shape[:3])
        rows = zip(*(x.transpose(1, 2) for x in (grad_out, query, key, value, out)), lse, strict=True)
        done = [row_backward(*row, scale, is_causal, -1, 0.0) for row in rows]
        return tuple(torch.stack([grads[i] for grads in done]).transpose(1, 2).to(query.dtype) for i in range(3))

    return {
        "_scaled_dot_product_cudnn_attention": forward,
        "_scaled_dot_product_cudnn_attention_backward": backward,
    }


KERNELS = ("flash-attn", "torch's flash", "cudnn", "cudnn, old statistics")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts a stand-in in a library's place; gives the backend that uses it."""
    name = request.param
    monkeypatch.setattr(parts, "require_gpu", lambda *_: None)
    monkeypatch.setattr(flash, "_installed", lambda: name == "flash-attn")
    if name == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in())
        return "flash"
    functions = aten_flash() if name == "torch's flash" else aten_cudnn(3 if "old" in name else 4)
    for operator, function in functions.items():
        monkeypatch.setattr(torch.ops.aten, operator, function)
    return name.split(",")[0].removeprefix("torch's ")


MORE = {
    "packed, one prefix a row": lambda: packed([3, 0, 2], P=7),
    "shared by three rows": lambda: dense(B=3, T=4, P=5, A=1),
    "tokens first in memory": lambda: dense(B=3, T=70, P=33, A=1, D=24),
    "packed, sinks, shared": lambda: packed([70, 1, 33], P=20, A=1, D=24, sinks=True),
}
DENSE = (
    "no prefix", "shared prefix", "one prefix a row", "H = G", "G = 1", "D = 80", "one row", "one query", "not causal",
    "not causal, T ≠ S", "sinks", "S = 0", "S = 0 without prefix", "scale", "shared by three rows",
    "tokens first in memory",
)  # fmt: skip
ALL = (
    *DENSE, "P = 1", "T < S", "T > S: the first queries see no token", "T > S without prefix: out 0, lse −inf",
    "window", "sinks where nothing is seen", "packed", "packed without prefix", "packed, rows of length 0",
    "packed, keys longer and shorter", "packed, equal rows", "packed, one prefix a row", "packed, sinks, shared",
)  # fmt: skip
TAKEN = {
    "flash-attn": (*ALL, "softcap", "packed, not causal"), "torch's flash": ALL, "cudnn": DENSE,
    "cudnn, old statistics": ("shared prefix",),
}  # fmt: skip
PAIRS = [(kernel, name) for kernel, names in TAKEN.items() for name in names]


@pytest.mark.parametrize(("kernel", "name"), PAIRS, indirect=["kernel"])
def test_matches_the_oracle(name: str, kernel: str) -> None:
    case = on_device((MORE.get(name) or CASES[name])()).to(torch.float16)
    got, want = case.run(kernel, with_lse=False), case.to(torch.float64).run("reference", with_lse=False)
    for key in want:
        assert got[key].shape == want[key].shape
        torch.testing.assert_close(got[key].double(), want[key], rtol=4e-3, atol=4e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kernel", KERNELS[:3], indirect=True)
def test_only_parts_with_a_wanted_gradient_are_called(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen base's first layer asks for the prefix's gradient alone: the tokens' backward is not called."""
    case = on_device(CASES["shared prefix"]()).to(torch.float16)
    called = []
    engine = importlib.import_module(f"softkv.ops.library.{kernel}")._engine
    plain = engine.kernel.backward
    monkeypatch.setattr(engine.kernel, "backward", lambda grad, q, part, *rest: (
        called.append(part.name) or plain(grad, q, part, *rest)))  # fmt: skip
    for asked in (("prefix_k",), ("v",), ("q",)):
        leaves = {name: x.detach().requires_grad_(name in asked) for name, x in case.leaves.items()}
        Case(leaves, case.options).call(backend=kernel)[0].sum().backward()
    assert called == ["prefix", "tokens", "prefix", "tokens"]


REFUSED = {
    "bank with a row without prefix": "no prefix_index",
    "ragged rows": "no prefix_lengths",
    "left padding": "no key_mask",
    "part-filled cache": "no key_lengths",
    "window over the prefix": "no window_covers_prefix",
    "scale below 0": "scale above 0",
}


@pytest.mark.parametrize("kernel", KERNELS[:3], indirect=True)
def test_what_no_kernel_takes_is_refused(kernel: str) -> None:
    for name, expected in REFUSED.items():
        with pytest.raises(NotImplementedError, match=f"backend '{kernel}': expected .*{expected}"):
            on_device(CASES[name]()).to(torch.float16).call(backend=kernel)
    case = on_device(CASES["shared prefix"]())
    with pytest.raises(NotImplementedError, match="float16 or bfloat16"):
        case.to(torch.float32).call(backend=kernel)
    with pytest.raises(NotImplementedError, match="multiples of 8, got 20"):
        on_device(dense(D=20, P=3, A=1)).to(torch.float16).call(backend=kernel)
    with pytest.raises(NotImplementedError, match="no gradient of lse"):
        case.to(torch.float16).run(kernel)


@pytest.mark.parametrize(
    ("kernel", "name", "expected"),
    [
        ("cudnn", "packed", "dense rows of one length"),
        ("cudnn", "T < S", "as many queries as keys where causal .*, got 3 and 9"),
        ("cudnn", "T > S: the first queries see no token", "as many queries as keys"),
        ("cudnn", "window", "neither a soft cap nor a window"),
        ("cudnn", "softcap", "neither a soft cap nor a window"),
        ("cudnn", "P = 1", "two prefix or more a row"),
        ("torch's flash", "softcap", "no softcap without"),
    ],
    indirect=["kernel"],
)
def test_what_one_kernel_does_not_take_is_refused(kernel: str, name: str, expected: str) -> None:
    with pytest.raises(NotImplementedError, match=expected):
        on_device(CASES[name]()).to(torch.float16).call(backend=kernel)


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_tensors_elsewhere_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend '{backend}': expected a CUDA or ROCm tensor, got cpu"):
        CASES["shared prefix"]().to(torch.float16).call(backend=backend)


def test_an_activated_implementation_goes_before_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_installed", lambda: True)
    assert flash._chosen() is flash._PACKAGE
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert flash._chosen() is flash._TORCH


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_torch_knows_the_arguments(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operators, on meta tensors: their schemas bind what the engine hands over."""
    monkeypatch.setattr(parts, "require_gpu", lambda *_: None)
    monkeypatch.setattr(parts, "merge", lambda done, sinks, out: done[0][1])
    engine = importlib.import_module(f"softkv.ops.library.{backend}")
    q, k, v = (torch.empty(2, 5, heads, 16, device="meta", dtype=torch.float16).transpose(1, 2) for heads in (4, 2, 2))
    prefix = [torch.empty(1, 2, 7, 16, device="meta", dtype=torch.float16) for _ in "kv"]
    names = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k",
             "max_seqlen_q", "max_seqlen_k", "sinks", "window", "softcap", "chunk")  # fmt: skip
    options = dict.fromkeys(names) | {"is_causal": True, "window_covers_prefix": False, "scale": 0.25}
    out, lse = engine.forward(q, k, v, *prefix, **options)
    assert out.stride() == torch.empty_like(q).stride()
    grads = engine.backward(out, None, out, lse, q, k, v, *prefix, needs=(True,) * 5 + (False,), **options)
    assert [x.shape for x in grads[:5]] == [x.shape for x in (q, k, v, *prefix)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_merge(is_packed: bool, with_sinks: bool, dtype: torch.dtype) -> None:
    """Against float64; statistics of any strides, and both marks of a query that saw nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens = (77,) if is_packed else (3, 19)
    H, D = 3, 24
    outs = [torch.randn(*tokens, H, D, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    lses = [3 * torch.randn(*tokens, H, generator=generator).to(DEVICE).transpose(-1, -2) for _ in range(2)]
    lses[1] = lses[1].contiguous()
    lses[0][..., 0], lses[1][..., 0] = torch.inf, -torch.inf
    lses[1][..., 1] = torch.inf
    outs[1].transpose(-2, -3)[..., 1, :] = torch.nan  # of a query that saw nothing there
    sinks = torch.randn(H, generator=generator).to(DEVICE) if with_sinks else None
    out = torch.empty(*tokens[:-1], H, tokens[-1], D, dtype=dtype, device=DEVICE).transpose(-2, -3)
    lse = merge.merge(list(zip(outs, lses, strict=True)), sinks, out)
    logits = [x.double().masked_fill(x == torch.inf, -torch.inf) for x in lses]
    if sinks is not None:
        logits.append(sinks.double()[:, None].expand_as(logits[0]))
    total = torch.logsumexp(torch.stack(logits), 0)
    shares = [torch.exp(x - total).nan_to_num(0).transpose(-1, -2)[..., None] for x in logits[:2]]
    want = sum(share * x.double().nan_to_num(0) for share, x in zip(shares, outs, strict=True))
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=eps, atol=eps)
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=1e-6)
