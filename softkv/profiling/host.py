"""Host time of a call of the op, stage by stage, compared with `scaled_dot_product_attention` in the same rounds.

On a GPU the device is real and idle; elsewhere a driver that launches nothing (`no_device`) takes its place, and SDPA
computes on tensors so small that its time is overhead. A stage's time is the difference of two runs: with everything
after it replaced by prepared results, and with the stage replaced too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from softkv.ops import api, operator

MODES = ("forward", "forward + backward", "decoding")
_BATCHES = 15
_AXES = {  # B, H, G, T, P, D, and S if a cache precedes the query
    "cuda": {"forward": (2, 8, 2, 64, 16, 64), "decoding": (2, 8, 2, 1, 16, 64, 64)},
    "cpu": {"forward": (1, 2, 1, 24, 4, 16), "decoding": (1, 2, 1, 1, 4, 16, 24)},
}
Call = Callable[[], Any]
Variant = tuple[Call, Callable[[], AbstractContextManager[Any]]]


def measure(mode: str, device: str = "cpu", calls: int = 300) -> dict[str, Any]:
    """Microseconds of a call in a mode of `MODES`: `call`, its `stages`, `sdpa`, and `ratio`, the median over rounds.

    Args:
        calls: timed calls of each variant, in batches with a synchronisation between them.
    """
    grad = mode == "forward + backward"
    threads = torch.get_num_threads()
    with _launching(device), torch.set_grad_enabled(grad):
        leaves, direction = _operands(mode, device)
        call, plain = _calls(leaves, direction, grad)
        variants: dict[str, Variant] = {"call": (call, nullcontext), "sdpa": (plain, nullcontext)}
        for name, replaced in _replacements(call, leaves, grad).items():
            variants[name] = (call, replaced)
        torch.set_num_threads(1 if device == "cpu" else threads)
        try:
            times = _rounds(variants, device, calls)
        finally:
            torch.set_num_threads(threads)
    median = {name: statistics.median(sample) for name, sample in times.items()}
    behind = [median[name] for name in ("front door", "operator", "plan")] + [median["call"]]
    stages = dict(zip(("front door", "operator", "plan", "launch"), _differences(behind), strict=True))
    ratio = statistics.median(a / b for a, b in zip(times["call"], times["sdpa"], strict=True))
    return {"mode": mode, "device": device, "call": median["call"], "sdpa": median["sdpa"], "ratio": ratio,
            "stages": stages}  # fmt: skip


def sentence(record: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in record["stages"].items())
    return f"{record['call']:.1f} µs ({stages}), SDPA {record['sdpa']:.1f}: {record['ratio']:.2f}×"


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def _differences(ascending: list[float]) -> Iterator[float]:
    """Differences of consecutive times, 0 if noise makes one negative."""
    last = 0.0
    for value in ascending:
        yield max(0.0, value - last)
        last = max(last, value)


def _launching(device: str) -> AbstractContextManager[Any]:
    if device == "cuda":
        return nullcontext()
    from softkv.profiling.no_device import no_device

    operator.load_engine("triton")
    return no_device()


def _operands(mode: str, device: str) -> tuple[list[Tensor], Tensor]:
    B, H, G, T, P, D, *cached = _AXES[device]["decoding" if mode == "decoding" else "forward"]
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    q, k, v = (
        torch.randn(B, length, heads, D, **options).transpose(1, 2)
        for length, heads in ((T, H), (cached[0] if cached else T, G), (cached[0] if cached else T, G))
    )
    leaves = [q, k, v, *(torch.randn(1, G, P, D, **options) for _ in "kv")]
    if mode == "forward + backward":
        leaves = [x.requires_grad_() for x in leaves]
    return leaves, torch.randn_like(q)


def _calls(leaves: list[Tensor], direction: Tensor, grad: bool) -> tuple[Call, Call]:
    q, k, v = leaves[:3]
    causal = q.shape[2] > 1

    def ours() -> Any:
        return api.prefix_attention(*leaves, backend="triton")

    def plain() -> Any:
        return sdpa(q, k, v, is_causal=causal, enable_gqa=True)

    if not grad:
        return ours, plain
    return (
        lambda: torch.autograd.grad(ours(), leaves, direction),
        lambda: torch.autograd.grad(plain(), leaves[:3], direction),
    )


def _replacements(call: Call, leaves: list[Tensor], grad: bool) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Replacements for a stage and everything after it, keyed by the last stage that still runs."""
    with torch.no_grad():
        out, lse = api.prefix_attention(*leaves, backend="triton", return_lse=True)
    needed = out.detach().requires_grad_(grad), lse
    grads = tuple(torch.empty_like(x) for x in leaves) + (None,)
    ready = SimpleNamespace(
        forward=lambda *_, **__: (out, lse),
        backward=lambda *_, **__: grads,
        interpreter_enabled=operator.load_engine("triton").interpreter_enabled,
    )

    @contextmanager
    def no_operator() -> Iterator[None]:
        def leaf_gradients(outs: Any, *rest: Any, **options: Any) -> None:
            return None

        with (
            patch.object(api, "attention", lambda *_, **__: needed),
            patch.object(torch.autograd, "grad", leaf_gradients),
        ):
            yield

    @contextmanager
    def no_engine() -> Iterator[None]:
        with patch.dict(operator._loaded, {"triton": ready}):
            yield

    return {"front door": no_operator, "operator": no_engine, "plan": no_launch}


@contextmanager
def no_launch() -> Iterator[None]:
    """Compiled kernels are found and bound, but not launched."""
    from triton.compiler import CompiledKernel

    from softkv.profiling.no_device import Started

    def nothing(*arguments: Any) -> None:
        return None

    with patch.object(Started, "run", nothing), patch.object(CompiledKernel, "run", nothing):
        yield


def _rounds(variants: dict[str, Variant], device: str, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of each variant, one value per round; on a CPU, time of other processes is not counted."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    batch = max(1, calls // _BATCHES)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(_BATCHES + 1):
        for name, (call, replaced) in variants.items():
            with replaced():
                wait(device)
                start = clock()
                for _ in range(batch):
                    call()
                taken = clock() - start
                wait(device)
            if round_number:
                times[name].append(1e6 * taken / batch)
    return times
