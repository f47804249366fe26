"""An engine from any kernel that returns lse and whose backward takes out and lse: split, merge, one backward per
part."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softkv.ops.engine import empty_out
from softkv.ops.library.merge import merge


class Ends(NamedTuple):
    """Rows of a packed part, in flash-attn's convention."""

    q: Tensor  # [rows + 1] int32
    k: Tensor
    most_q: int
    most_k: int


@dataclass(frozen=True)
class Part:
    """One call of a kernel: all queries, or each row's, against one segment of keys.

    k and v are token by token: [rows, S, G, D], or packed [M, G, D] with `ends`. The kernel's queries have the same
    layout: [rows, T, H, D] or [N, H, D].
    """

    name: str
    k: Tensor
    v: Tensor
    causal: bool
    scale: float
    softcap: float | None
    window: int | None
    ends: Ends | None
    in_line: bool = False  # one key sequence for the queries of all rows

    def queries(self, x: Tensor) -> Tensor:
        """This part's share of a call's queries (or out, or its gradient), token by token."""
        return x.reshape(1, -1, *x.shape[-2:]) if self.in_line else x

    def statistics(self, lse: Tensor) -> Tensor:
        """A call's lse [B, H, T] or packed [H, N] in the layout of this part's queries."""
        if not self.in_line:
            return lse
        return (lse.transpose(0, 1).flatten(1) if lse.dim() == 3 else lse)[None].contiguous()

    def call_statistics(self, lse: Tensor, q: Tensor) -> Tensor:
        """The inverse of `statistics`; q: the call's queries, token by token."""
        if not self.in_line:
            return lse
        return lse[0] if q.dim() == 3 else lse[0].unflatten(1, q.shape[:2]).transpose(0, 1)


class Kernel(Protocol):
    """A library's attention. Statistics are natural logarithms, float32: [rows, H, T], packed [H, N]."""

    name: str

    def refuse(self, q: Tensor, parts: list[Part], **asked: bool) -> None:
        """Raise NotImplementedError if the kernel does not compute these parts exactly.

        `asked`: features that no library kernel supports, and whether the call uses them."""

    def forward(self, q: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """(out like q, of v's width; lse). A query that sees nothing has lse +∞ or −∞."""

    def backward(self, grad: Tensor, q: Tensor, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of p = exp(s − lse), where out and lse may be those of a larger attention; lse +∞: p is 0."""


class Library:
    """The engine around a kernel: the two functions of `softkv.ops.engine.Engine`."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        rows = _by_token(q)
        parts = _parts(q, k, v, prefix_k, prefix_v, options)
        self._refuse(rows, parts, options)
        done = [self._forward(rows, part) for part in parts]
        sinks = options["sinks"]
        if not done:
            return _nothing(q, v, sinks)
        out = empty_out(q, v)
        return out, merge(done, sinks, _by_token(out))

    def _forward(self, rows: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        out, lse = self.kernel.forward(part.queries(rows), part)
        return out.reshape(*rows.shape[:-1], out.shape[-1]), part.call_statistics(lse, rows)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
        prefix_k: Tensor | None, prefix_v: Tensor | None, *, needs: Any, **options: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Parts without needed gradients are skipped; for the others, the kernel computes all three gradients."""
        need_q, need_k, need_v, need_prefix_k, need_prefix_v, need_sinks = needs
        dense, sinks = q.dim() == 4, options["sinks"]
        rows, grad, merged = _by_token(q), _by_token(grad_out), _by_token(out)
        parts = _parts(q, k, v, prefix_k, prefix_v, options)
        self._refuse(rows, parts, options, grad_lse)
        seen = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing contributes nowhere
        dq: Tensor | None = None
        of_parts: dict[str, tuple[Tensor, Tensor]] = {}
        for part in parts:
            if not (need_q or (need_prefix_k or need_prefix_v if part.name == "prefix" else need_k or need_v)):
                continue
            operands = part.queries(grad), part.queries(rows), part, part.queries(merged), part.statistics(seen)
            part_dq, *of_parts[part.name] = self.kernel.backward(*operands)  # type: ignore[assignment]
            if need_q:
                dq = part_dq.reshape(rows.shape) if dq is None else dq + part_dq.reshape(rows.shape)
        dk, dv = of_parts.get("tokens", (None, None))
        dprefix_k, dprefix_v = of_parts.get("prefix", (None, None))
        dsinks = None
        if need_sinks and sinks is not None:
            delta = (grad.float() * merged.float()).sum(-1).transpose(-1, -2)  # [B, H, T] or [H, N]
            share = torch.exp(sinks.float()[:, None] - lse)
            dsinks = -(share * delta).sum((0, 2) if dense else 1).to(sinks.dtype)
        return (
            None if dq is None else _by_head(dq, dense),
            _by_head(dk, dense) if need_k and dk is not None else None,
            _by_head(dv, dense) if need_v and dv is not None else None,
            _as_bank(dprefix_k, prefix_k) if need_prefix_k and dprefix_k is not None else None,
            _as_bank(dprefix_v, prefix_v) if need_prefix_v and dprefix_v is not None else None,
            dsinks,
        )

    def _refuse(self, rows: Tensor, parts: list[Part], options: dict[str, Any], grad_lse: Tensor | None = None) -> None:
        given = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "chunk")
        asked = {name: options[name] is not None for name in given}
        asked["window_covers_prefix"] = options["window_covers_prefix"] and any(p.name == "prefix" for p in parts)
        self.kernel.refuse(rows, parts, **asked, **{"gradient of lse": grad_lse is not None})


def _nothing(q: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result for queries that have neither a prefix nor a token to see."""
    lse = q.new_full((*q.shape[:3],) if q.dim() == 4 else (q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    if sinks is not None:
        lse.copy_(sinks.float()[:, None])
    return empty_out(q, v).zero_(), lse


def require_gpu(kernel: str, q: Tensor) -> None:
    if not q.is_cuda:
        raise RuntimeError(f"backend '{kernel}': expected a CUDA or ROCm tensor, got {q.device}")


def refuse_common(kernel: str, q: Tensor, parts: list[Part], most_dim: int, asked: dict[str, bool]) -> None:
    """Refuse what no library kernel supports: dtypes, head dims, scales, and the features in `asked`."""
    require_gpu(kernel, q)
    for name, is_asked in asked.items():
        if is_asked:
            raise NotImplementedError(f"backend '{kernel}': expected no {name}: its kernels do not support it")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend '{kernel}': expected float16 or bfloat16, got {q.dtype}")
    for width in {q.shape[-1], *(part.v.shape[-1] for part in parts)}:
        if width > most_dim or width % 8:
            raise NotImplementedError(
                f"backend '{kernel}': expected head dims ≤ {most_dim} and multiples of 8, got {width}"
            )
    if any(part.scale <= 0 for part in parts):
        raise NotImplementedError(
            f"backend '{kernel}': expected a scale above 0, which its kernels need, got {parts[0].scale}"
        )


def _parts(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, options: dict[str, Any]
) -> list[Part]:
    """The prefix, if there is one, and the tokens, if there are any."""
    cu_q, cu_k = options["cu_seqlens_q"], options["cu_seqlens_k"]
    scale, softcap, parts = options["scale"], options["softcap"], []
    if prefix_k is not None and prefix_v is not None:
        pk, pv = prefix_k.transpose(1, 2), prefix_v.transpose(1, 2)  # [A, P, G, D]
        A, P = pk.shape[:2]
        ends = None
        if cu_q is not None and A > 1:
            bank = torch.arange(A + 1, device=q.device, dtype=torch.int32) * P
            ends = Ends(cu_q, bank, options["max_seqlen_q"], P)
            pk, pv = pk.flatten(0, 1), pv.flatten(0, 1)
        parts.append(Part("prefix", pk, pv, False, scale, softcap, None, ends, in_line=A == 1))
    if k.numel():
        ends, one_query = None, q.dim() == 4 and q.shape[2] == 1
        if cu_q is not None:
            ends = Ends(cu_q, cu_k, options["max_seqlen_q"], options["max_seqlen_k"])
        # The single query of a row is at the last key and sees all of them, so only a window masks anything.
        causal = options["is_causal"] and not (one_query and options["window"] is None)
        parts.append(Part("tokens", _by_token(k), _by_token(v), causal, scale, softcap, options["window"], ends))
    return parts


def _by_token(x: Tensor) -> Tensor:
    """[B, H, T, D] → [B, T, H, D]; packed [N, H, D] is returned as it is."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def _by_head(x: Tensor, dense: bool) -> Tensor:
    return x.transpose(1, 2) if dense else x


def _as_bank(grad: Tensor, prefix: Tensor | None) -> Tensor:
    """[A, P, G, D], or [A·P, G, D] of packed rows → [A, G, P, D]"""
    assert prefix is not None
    A, G, P, D = prefix.shape
    return grad.reshape(A, P, G, D).transpose(1, 2)
