"""A stand-in for a GPU's driver: kernels are prepared as for the device, but launches do nothing.

Everything before the driver runs as it does with a GPU: argument binding, specialisation, caches, grids. The host time
of a call can thus be measured, and its launches inspected, on any machine. Results are uninitialised memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_KERNELS = "softkv."


class NoDevice:
    """A driver with a target but no device."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Started:
    """A replacement for a compiled kernel, whose launches are only counted."""

    function = module = 0
    packed_metadata = ()

    def __init__(self, name: str, counts: dict[str, int]):
        self.name, self.hash, self.counts = name, name, counts
        self.metadata = SimpleNamespace(name=name, shared=0, num_warps=4, num_ctas=1)

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.counts[self.name] = self.counts.get(self.name, 0) + 1


@contextmanager
def no_device(target: str = "sm_90") -> Iterator[dict[str, int]]:
    """A context in which `backend="triton"` accepts CPU tensors and launches for `target`. Yields the number of
    launches by kernel.

    Raises RuntimeError with TRITON_INTERPRET, where kernels are Python functions.
    """
    import softkv.kernels as engine
    from softkv.profiling.compile import TARGETS

    if engine.interpreter_enabled():
        raise RuntimeError("no_device: expected TRITON_INTERPRET to be unset: interpreted kernels are not launched")
    counts: dict[str, int] = {}
    gpu, here = TARGETS[target]

    def prepared(kernel: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Started:
        cache = kernel.device_caches[device][0]
        cache[key] = Started(kernel.__name__.removesuffix("_kernel"), counts)
        return cache[key]

    before = driver._active
    with ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith(_KERNELS)]:
            for name, answer in (("target_of", lambda x: here), ("interpreter_enabled", lambda: True)):
                if name in vars(module):
                    patches.enter_context(patch.object(module, name, answer))
        patches.enter_context(patch.object(JITFunction, "_do_compile", prepared))
        driver.set_active(NoDevice(gpu))
        _forget()
        try:
            yield counts
        finally:
            driver._active = before
            _forget()


def _forget() -> None:
    """Clear the kernels' caches of compiled code, which are keyed by device number, not by device."""
    for module in [module for name, module in sys.modules.items() if name.startswith(_KERNELS)]:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
