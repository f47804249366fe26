"""backend="cudnn": torch's cuDNN attention, `aten::_scaled_dot_product_cudnn_attention` and its backward.

Its causal mask is aligned top-left, so the tokens' part must be square; all rows must have the same length.
"""

import torch
from torch import Tensor

from softkv.ops.library.parts import Library, Part, refuse_common

MOST_DIM = 128


class Cudnn:
    name = "cudnn"

    def __init__(self) -> None:
        self._statistics_dims = 4  # as torch's forward returns and its backward takes them: [B, H, T] or [B, H, T, 1]

    def refuse(self, q: Tensor, parts: list[Part], **asked: bool) -> None:
        refuse_common(self.name, q, parts, MOST_DIM, asked)
        for part in parts:
            T, S = (q.shape[1], part.k.shape[1]) if part.ends is None else (0, 0)
            if part.ends is not None:
                self._refuse("dense rows of one length: packed rows are not supported")
            if part.softcap is not None or part.window is not None:
                self._refuse("neither a soft cap nor a window: its kernels do not support them")
            if part.causal and T != S:
                self._refuse(f"as many queries as keys where causal (it aligns top-left), got {T} and {S}")
            if S == 1:
                self._refuse(f"two {part.name} or more a row, got 1")

    def _refuse(self, expected: str) -> None:
        raise NotImplementedError(f"backend 'cudnn': expected {expected}")

    def forward(self, q: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(1, 2) for x in (q, part.k, part.v)), None, True, 0.0, part.causal, False, scale=part.scale
        )
        self._statistics_dims = lse.dim()
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def backward(self, grad: Tensor, q: Tensor, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._statistics_dims == 4:
            lse = lse.unsqueeze(-1)
        no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
        flipped = (x.transpose(1, 2) for x in (grad, q, part.k, part.v, out))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *flipped, lse.contiguous(), no_dropout, no_dropout, None, None, None, q.shape[1], part.k.shape[1], 0.0,
            part.causal, scale=part.scale,
        )  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


_engine = Library(Cudnn())
forward, backward = _engine.forward, _engine.backward
