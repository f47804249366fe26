"""Shapes of the op's jobs, and the providers that compute them: softkv's engines, the peers, the floors without a
prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from softkv import prefix_attention

from ..providers import AttentionProblem, flex
from ..shapes import Shape

_TRAINING = (
    Shape(8, 32, 8, 2048, 128, 128),
    Shape(8, 16, 16, 2048, 64, 64),
    Shape(4, 32, 8, 4096, 1024, 128),
    Shape(64, 32, 8, 256, 128, 128),
    Shape(16, 9, 3, 256, 64, 64),
    Shape(16, 32, 8, 512, 2048, 64),
    Shape(1, 32, 8, 16384, 128, 128),
)
_DECODING = (
    Shape(1, 32, 8, 1, 2048, 128, S=512),
    Shape(64, 32, 8, 1, 2048, 128, S=512),
    Shape(64, 32, 8, 1, 8192, 128, S=512),
    Shape(256, 32, 8, 1, 2048, 128, S=256),
)
SHAPES = {"training": _TRAINING, "decoding": _DECODING}
QUICK = {"training": (Shape(1, 2, 1, 20, 9, 16),), "decoding": (Shape(1, 2, 1, 1, 9, 16, S=12),)}
ENGINES = ("triton", "cudnn", "flash")
_PINNED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def pinned(backend: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call of SDPA that may take no other of torch's kernels."""

    def run() -> Tensor:
        with sdpa_kernel(_PINNED[backend]):
            return call()

    return run


def ways(problem: AttentionProblem) -> dict[str, tuple[Callable[[], Callable[[], Any]], bool]]:
    """Name → (what makes the call, whether it attends to the prefix). Making a call may fail: it says why."""
    keys = problem.joiner()
    options: dict[str, Any] = {"enable_gqa": problem.grouped}

    def cat(backend: str) -> Callable[[], Any]:
        mask: Any = None
        if problem.mode != "decoding":
            if backend == "flash":
                from torch.nn.attention.bias import causal_lower_right

                mask = causal_lower_right(problem.shape.T, problem.shape.P + problem.shape.keys)
            else:
                mask = problem.seen()
        return pinned(backend, lambda: sdpa(problem.q, *keys(), attn_mask=mask, **options))

    def floor(backend: str) -> Callable[[], Any]:
        causal = problem.mode != "decoding"
        return pinned(backend, lambda: sdpa(problem.q, problem.k, problem.v, is_causal=causal, **options))

    def softkv(backend: str) -> Callable[[], Any]:
        return partial(prefix_attention, *problem.leaves, backend=backend)

    found: dict[str, tuple[Callable[[], Callable[[], Any]], bool]] = {
        f"softkv {engine}": (partial(softkv, engine), True) for engine in ENGINES
    }
    for name in _PINNED:
        found[f"cat + {name}"] = (partial(cat, name), True)
    if problem.mode != "decoding":
        if problem.on_gpu:
            found["cat + flex"] = (partial(flex, problem), True)
        found["softkv, no prefix"] = (lambda: partial(prefix_attention, *problem.leaves[:3], backend="triton"), False)
    for name in _PINNED:
        found[f"{name}, no prefix"] = (partial(floor, name), False)
    return found


def engine_options(shape: Shape) -> dict[str, Any]:
    """The keywords of an engine's `forward` and `backward` for a plain causal call."""
    from softkv.kernels.tuning import OPTIONS

    return OPTIONS | {"scale": shape.D**-0.5}
