"""The flash-attn engine's split and merge, against a stand-in module with flash-attn's documented signatures (2.7)."""

import sys
import types

import pytest
import torch
from torch import Tensor

from tests.attention_cases import CASES, dense, packed


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: int, softcap: float) -> tuple[Tensor, Tensor]:
    """(s [H, T, S] fp64 with −∞ where hidden, ds/d(q kᵀ)) of one row: q [T, H, D], k [S, H, D]."""
    s = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    slope = torch.full_like(s, scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        slope = scale * (1 - (s / softcap) ** 2)
    T, S = s.shape[1:]
    at = torch.arange(T)[:, None] + S - T
    hidden = (torch.arange(S) > at) if causal else torch.zeros(T, S, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (torch.arange(S) < at - left)
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
    p = torch.where(s == float("-inf"), 0.0, torch.exp(s - lse.double()[..., None]))
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


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in())


TAKEN = (
    "no prefix", "shared prefix", "one prefix a row", "P = 1", "H = G", "G = 1", "D = 80", "one row", "one query",
    "T < S",
    "T > S: the first queries see no token", "T > S without prefix: out 0, lse −inf", "S = 0", "S = 0 without prefix",
    "not causal", "window", "softcap", "sinks", "sinks where nothing is seen", "packed", "packed without prefix",
    "packed, rows of length 0", "packed, keys longer and shorter", "packed, equal rows", "packed, not causal",
)  # fmt: skip
MORE = {
    "packed, one prefix a row": lambda: packed([3, 0, 2], P=7),
    "shared by three rows": lambda: dense(B=3, T=4, P=5, A=1),
}


@pytest.mark.parametrize("name", [*TAKEN, *MORE])
def test_matches_the_oracle(name: str, flash: None) -> None:
    case = (MORE.get(name) or CASES[name])().to(torch.float16)
    got, want = case.run("flash", with_lse=False), case.to(torch.float64).run("reference", with_lse=False)
    for key in want:
        torch.testing.assert_close(got[key].double(), want[key], rtol=4e-3, atol=4e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_what_flash_attn_does_not_take_is_refused(flash: None) -> None:
    for name in (
        "bank with a row without prefix",
        "left padding",
        "part-filled cache",
        "window over the prefix",
        "scale below 0",
    ):
        with pytest.raises(NotImplementedError, match="flash"):
            CASES[name]().to(torch.float16).call(backend="flash")
    with pytest.raises(NotImplementedError, match="float16"):
        CASES["shared prefix"]().to(torch.float32).call(backend="flash")


def test_says_when_flash_attn_is_missing() -> None:
    if "flash_attn" in sys.modules:
        pytest.skip("flash-attn is installed")
    with pytest.raises(RuntimeError, match="pip install"):
        CASES["shared prefix"]().to(torch.float16).call(backend="flash")
