"""The flash-attn engine (`backend="flash"`): the prefix and the tokens are two calls, merged by their log-sum-exp.

    lse = log(exp(lse_prefix) + exp(lse_tokens) + exp(sink)),     out = Σ_part exp(lse_part − lse) out_part

Backward: flash-attn's backward, given the *merged* out and lse, computes each part's own share exp(s − lse), so one
call a part gives exact gradients; dq is their sum. A prefix shared by all rows is one key sequence for all queries of
the batch in one line, so its gradient comes out summed over the rows.

flash-attn (Dao et al., https://github.com/Dao-AILab/flash-attention) is optional, and installed by itself, because its
build needs the torch that is there: `pip install flash-attn --no-build-isolation`. What its kernels don't take is
refused, never emulated. Axes as in `softkv.prefix_attention`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Part:
    """One call of flash-attn: q against one stretch of keys. Dense [B, T, H, D], packed [N, H, D] with cu_seqlens."""

    k: Tensor
    v: Tensor
    causal: bool
    scale: float
    softcap: float
    window: tuple[int, int]
    cu: tuple[Tensor, Tensor, int, int] | None
    flat: bool = False  # all queries of the batch in one line

    def _arguments(self) -> dict[str, Any]:
        return {
            "dropout_p": 0.0, "softmax_scale": self.scale, "causal": self.causal, "window_size_left": self.window[0],
            "window_size_right": self.window[1], "softcap": self.softcap, "alibi_slopes": None,
        }  # fmt: skip

    def _queries(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, *x.shape[-2:]) if self.flat else x

    def _statistics(self, lse: Tensor) -> Tensor:
        """[B, H, T] or packed [H, N], as this part's call has it."""
        if not self.flat:
            return lse
        return (lse.transpose(0, 1).flatten(1) if lse.dim() == 3 else lse)[None].contiguous()

    def _own_statistics(self, lse: Tensor, q: Tensor) -> Tensor:
        if not self.flat:
            return lse
        return lse[0] if q.dim() == 3 else lse[0].unflatten(1, q.shape[:2]).transpose(0, 1)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        api = _api()
        if self.cu is None:
            run = api._flash_attn_forward
            out, lse = run(self._queries(q), self.k, self.v, **self._arguments(), return_softmax=False)[:2]
        else:
            run = api._flash_attn_varlen_forward
            out, lse = run(q, self.k, self.v, *self.cu, **self._arguments(), return_softmax=False)[:2]
        lse = self._own_statistics(lse, q)
        return out.reshape(q.shape), lse.masked_fill(lse == float("inf"), float("-inf"))  # its mark of an empty row

    def backward(self, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        api = _api()
        grad, q_, out = (self._queries(x) for x in (grad, q, out))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_, self.k, self.v))
        operands = (grad, q_, self.k, self.v, out, self._statistics(lse), dq, dk, dv)
        if self.cu is None:
            api._flash_attn_backward(*operands, **self._arguments(), deterministic=True)
        else:
            api._flash_attn_varlen_backward(*operands, *self.cu, **self._arguments(), deterministic=True)
        return dq.reshape(q.shape), dk, dv


def _api() -> Any:
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as missing:
        how = "pip install flash-attn --no-build-isolation"
        raise RuntimeError(f"backend 'flash': expected flash-attn, got none: {how}") from missing


def _refuse(q: Tensor, v: Tensor, scale: float, **asked: Any) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend 'flash': expected float16 or bfloat16, got {q.dtype}")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise NotImplementedError(f"backend 'flash': expected D ≤ 256 and a multiple of 8, got {q.shape[-1]}")
    if v.shape[-1] != q.shape[-1]:
        raise NotImplementedError(
            f"backend 'flash': expected values as wide as keys, D = {q.shape[-1]}, got Dv = {v.shape[-1]}"
        )
    if scale <= 0:
        raise NotImplementedError(f"backend 'flash': expected a scale above 0, which its kernels need, got {scale}")
    for name, value in asked.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"backend 'flash': expected no {name}: flash-attn's kernels do not take it")


def _parts(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, o: dict[str, Any]
) -> list[_Part]:
    """The prefix (first, if there is one) and the tokens (if there are any), in flash-attn's layout."""
    _refuse(
        q, v, o["scale"], prefix_index=o["prefix_index"], prefix_lengths=o["prefix_lengths"], key_mask=o["key_mask"],
        key_lengths=o["key_lengths"], chunk=o["chunk"],
        window_covers_prefix=prefix_k is not None and o["window_covers_prefix"],
    )  # fmt: skip
    is_packed = o["cu_seqlens_q"] is not None
    softcap = o["softcap"] or 0.0
    parts = []
    if prefix_k is not None and prefix_v is not None:
        pk, pv = prefix_k.transpose(1, 2), prefix_v.transpose(1, 2)  # [A, P, G, D]
        A, P = pk.shape[:2]
        cu = None
        if is_packed and A > 1:
            ends = torch.arange(A + 1, device=q.device, dtype=torch.int32) * P
            cu = (o["cu_seqlens_q"], ends, o["max_seqlen_q"], P)
            pk, pv = pk.flatten(0, 1), pv.flatten(0, 1)
        parts.append(_Part(pk, pv, False, o["scale"], softcap, (-1, -1), cu, flat=A == 1))
    if k.numel():
        left = -1 if o["window"] is None else o["window"] - 1
        window = (left, 0 if o["is_causal"] else -1)
        if is_packed:
            cu = (o["cu_seqlens_q"], o["cu_seqlens_k"], o["max_seqlen_q"], o["max_seqlen_k"])
        else:
            k, v, cu = k.transpose(1, 2), v.transpose(1, 2), None
        parts.append(_Part(k, v, o["is_causal"], o["scale"], softcap, window, cu))
    return parts


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse): arguments of `softkv.kernels.forward`."""
    parts = _parts(q, k, v, prefix_k, prefix_v, options)
    dense = q.dim() == 4
    rows = q.transpose(1, 2) if dense else q
    done = [part.forward(rows) for part in parts]
    shape = (q.shape[0], q.shape[1], q.shape[2]) if dense else (q.shape[1], q.shape[0])
    logits = [lse for _, lse in done]
    if options["sinks"] is not None:
        logits.append(options["sinks"].float()[:, None].expand(shape))
    lse = torch.logsumexp(torch.stack(logits), 0) if logits else q.new_full(shape, float("-inf"), dtype=torch.float32)
    total = torch.zeros(rows.shape, dtype=torch.float32, device=q.device)
    for out, part_lse in done:
        share = torch.where(part_lse == float("-inf"), 0.0, torch.exp(part_lse - lse))
        total = total + share.transpose(-1, -2)[..., None] * out
    out = torch.empty_like(q)
    return out.copy_(total.transpose(1, 2) if dense else total), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    prefix_k: Tensor | None, prefix_v: Tensor | None, *, needs: Sequence[bool], **options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dprefix_k, dprefix_v, dsinks): arguments of `softkv.kernels.backward`.

    None where not asked for, or where nothing was read (zero). A part none of whose gradients is asked for is not
    called; of one that is, flash-attn's kernel computes all three.
    """
    _refuse(q, v, options["scale"], **{"gradient of lse": grad_lse})
    need_q, need_k, need_v, need_pk, need_pv, need_sinks = needs
    dense = q.dim() == 4

    def flip(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if dense else x

    grad, rows, merged = flip(grad_out), flip(q), flip(out)
    seen = lse.masked_fill(lse == float("-inf"), float("inf"))  # a query that saw nothing has no share anywhere
    parts = _parts(q, k, v, prefix_k, prefix_v, options)
    dq = dk = dv = dpk = dpv = dsinks = None
    for i, part in enumerate(parts):
        is_prefix = i == 0 and prefix_k is not None
        if not (need_q or (need_pk or need_pv if is_prefix else need_k or need_v)):
            continue
        part_dq, part_dk, part_dv = part.backward(grad, rows, merged, seen)
        if need_q:
            dq = flip(part_dq) if dq is None else dq + flip(part_dq)
        if is_prefix:
            assert prefix_k is not None
            A, G, P, D = prefix_k.shape
            dpk, dpv = (x.reshape(A, P, G, D).transpose(1, 2) for x in (part_dk, part_dv))
        else:
            dk, dv = (flip(part_dk) if need_k else None), (flip(part_dv) if need_v else None)
    if need_sinks and options["sinks"] is not None:
        delta = (grad.float() * merged.float()).sum(-1).transpose(-1, -2)  # [B, H, T] or [H, N]
        share = torch.exp(options["sinks"].float()[:, None] - lse)
        dsinks = -(share * delta).sum((0, 2) if dense else 1).to(options["sinks"].dtype)
    return dq, dk, dv, dpk if need_pk else None, dpv if need_pv else None, dsinks
