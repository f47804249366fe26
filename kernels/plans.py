"""The cache of plans, keyed by everything that they depend on: the kind of call, its tensors' shapes, strides, dtypes
and alignment, its options, the driver and the device that launches go to, the tiles in use, and whether TF32 is
allowed."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from triton.runtime.driver import driver

from softkv.kernels.launch import INTERPRETED, Plan, Tensors, recording_target
from softkv.kernels.problem import Options, Problem
from softkv.kernels.tiles import MEASURED

MOST_PLANS = 1024
SMALL_STORAGE = 2**31  # bytes within which AMD's loads need no 64-bit addresses

_kept: dict[Any, Plan] = {}
_lock = Lock()


def _device_of_launches() -> tuple[Any, ...]:
    if INTERPRETED:
        return ()
    active = driver.active
    return active, active.get_current_device()


def find_plan(make: Callable[..., Plan], x: Tensors, options: Options, more: tuple[Any, ...]) -> Plan:
    """The cached plan for such a call, or else `make(problem, *more)`."""
    if recording_target() is not None:
        return make(Problem.of(x, options), *more)
    key = (
        make, *[None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in x.values()], options,
        more, x["q"].device, *_device_of_launches(), MEASURED.changes,
        x["q"].dtype == torch.float32 and torch.get_float32_matmul_precision(),
    )  # fmt: skip
    if torch.version.hip:
        key += tuple(t is not None and t.untyped_storage().nbytes() < SMALL_STORAGE for t in x.values())
    plan = _kept.get(key)
    if plan is None:
        plan = make(Problem.of(x, options), *more)
        with _lock:
            while len(_kept) >= MOST_PLANS:
                del _kept[next(iter(_kept))]
            _kept[key] = plan
    return plan
