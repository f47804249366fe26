"""The interface between the public functions and an engine: the arguments of a call, and an engine's two functions.

The operator's schema, the tensors saved for backward and the keywords of engines are all derived from `Call`.
"""

from typing import NamedTuple, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack


class Call(TypedDict):
    """The validated arguments of one call. Axes as in `softkv.prefix_attention`.

    Dense: q [B, H, T, D], k [B, G, S, D], v [B, G, S, Dv], without cu_seqlens and max_seqlen. Packed: q [N, H, D], k
    [M, G, D], v [M, G, Dv], int32 cu_seqlens [rows + 1], without key_mask and key_lengths.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    key_mask: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    sinks: Tensor | None
    scale: float
    is_causal: bool
    window: int | None
    window_covers_prefix: bool
    chunk: int | None
    softcap: float | None


class Needs(NamedTuple):
    """The gradients that a backward must compute. The fields are the call's differentiable operands."""

    q: bool
    k: bool
    v: bool
    prefix_k: bool
    prefix_v: bool
    sinks: bool


NO_DOUBLE_BACKWARD = "prefix_attention: double backward is not supported; backend='reference' is"

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Engine(Protocol):
    """A module with these two functions, and where it has shorter ways for some calls, `step`, `differentiable` and
    `with_gradients` (see `softkv.ops.torch`). It trusts its arguments, and raises NotImplementedError, naming backend
    and option, for a valid call that it cannot serve.

    There is at least one query. The prefix is None or [A, G, P, D] and [A, G, P, Dv] with P ≥ 1; without an index A is
    1 (shared) or the number of rows. The last dim of q, k, v and the prefix is contiguous.
    """

    def forward(self, **call: Unpack[Call]) -> tuple[Tensor, Tensor]:
        """(out, lse): out as `empty_out`; lse [B, H, T] or packed [H, N], contiguous, in at least float32."""

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *,
        needs: Needs,
        **call: Unpack[Call],
    ) -> Gradients:
        """The gradients in the order of `Needs`; None if not needed, or if nothing was read (zero)."""


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """An output [..., Dv] in q's dtype, with q's layout if Dv = D, else token by token."""
    if v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    if q.dim() == 3:
        return q.new_empty(*q.shape[:2], v.shape[-1])
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
