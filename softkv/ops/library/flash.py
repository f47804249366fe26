"""backend="flash": flash-attn's kernels, from the flash-attn package if it is installed, otherwise torch's own.

torch's are FlashAttention-2, or the implementation activated by `torch.nn.attention.activate_flash_attention_impl`
("FA3", "FA4"), which then takes precedence. Causal masks are aligned bottom-right. The package (`pip install flash-attn
--no-build-isolation`, https://github.com/Dao-AILab/flash-attention) also supports soft caps, and its dq is
deterministic; torch's is with `torch.use_deterministic_algorithms`.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from softkv.ops.library.parts import Library, Part, refuse_common

MOST_DIM = 256


class Flash:
    """Whichever of the two is available, looked up in each call, because an implementation may be activated at any
    time."""

    name = "flash"

    def refuse(self, q: Tensor, parts: list[Part], **asked: bool) -> None:
        refuse_common(self.name, q, parts, MOST_DIM, asked)
        if any(part.v.shape[-1] != q.shape[-1] for part in parts):
            raise NotImplementedError("backend 'flash': expected values as wide as keys, as its kernels need")
        if _chosen() is not _TORCH:
            return
        if any(part.softcap is not None for part in parts):
            raise NotImplementedError(
                "backend 'flash': expected no softcap without `pip install flash-attn --no-build-isolation`"
            )
        if torch.version.hip and any(part.causal and not _is_square(q, part) for part in parts):
            raise NotImplementedError("backend 'flash': expected as many queries as keys on ROCm, where causal")

    def forward(self, q: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        return _chosen().forward(q, part)

    def backward(self, grad: Tensor, q: Tensor, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _chosen().backward(grad, q, part, out, lse)


class _Torch:
    """`aten::_flash_attention_forward` and its backward."""

    def forward(self, q: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        ends = (None, None, q.shape[-3], part.k.shape[-3]) if part.ends is None else part.ends
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, part.k, part.v, *ends, 0.0, part.causal, False, scale=part.scale, **_window(part)
        )
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = (None, None, q.shape[-3], part.k.shape[-3]) if part.ends is None else part.ends
        no_dropout = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        return torch.ops.aten._flash_attention_backward(
            grad, q, part.k, part.v, out, lse.contiguous(), *ends, 0.0, part.causal, *no_dropout, scale=part.scale,
            **_window(part),
        )  # fmt: skip


def _window(part: Part) -> dict[str, int]:
    return {} if part.window is None else {"window_size_left": part.window - 1, "window_size_right": 0}


class _Package:
    """flash-attn 2."""

    def forward(self, q: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        api = _api()
        run, ends = (api._flash_attn_forward, ()) if part.ends is None else (api._flash_attn_varlen_forward, part.ends)
        out, lse, *_ = run(q, part.k, part.v, *ends, **self._options(part), return_softmax=False)
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, part: Part, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        api = _api()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, part.k, part.v))
        run, ends = (
            (api._flash_attn_backward, ()) if part.ends is None else (api._flash_attn_varlen_backward, part.ends)
        )
        operands = grad, q, part.k, part.v, out, lse.contiguous(), dq, dk, dv
        run(*operands, *ends, **self._options(part), deterministic=True)
        return dq, dk, dv

    def _options(self, part: Part) -> dict[str, Any]:
        return {
            "dropout_p": 0.0, "softmax_scale": part.scale, "causal": part.causal,
            "window_size_left": -1 if part.window is None else part.window - 1,
            "window_size_right": 0 if part.causal else -1, "softcap": part.softcap or 0.0, "alibi_slopes": None,
        }  # fmt: skip


_TORCH, _PACKAGE = _Torch(), _Package()


def _chosen() -> _Torch | _Package:
    if torch.nn.attention.current_flash_attention_impl() is not None or not _installed():
        return _TORCH
    return _PACKAGE


@cache
def _installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _api() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _is_square(q: Tensor, part: Part) -> bool:
    return part.ends.q is part.ends.k if part.ends is not None else q.shape[1] == part.k.shape[1]


_engine = Library(Flash())
forward, backward = _engine.forward, _engine.backward
