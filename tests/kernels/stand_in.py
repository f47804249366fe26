"""A stand-in for a GPU: Triton's JIT and softkv's plans run as on a device, but nothing is compiled or launched.

`standing_in()` names a target; every launch is kept as a `StartedLaunch` with its arguments (`profiling.no_device` only
counts them). To be used in a process without TRITON_INTERPRET.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from softkv.profiling.no_device import NoDevice

HOPPER = GPUTarget("cuda", 90, 32)


class Device(NoDevice):
    """Devices and streams by number."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.device, self.stream = 0, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream


class StartedLaunch(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    stream: int
    about: Any
    hooks: tuple[Any, Any]
    arguments: tuple[Any, ...]


class NoKernel:
    """A compiled kernel that only says what it is asked."""

    function = packed_metadata = None

    def __init__(self, source: Any, options: dict[str, Any], kept: list[StartedLaunch]):
        self.source, self.options, self.kept = source, options, kept

    def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> Any:
        return {"name": self.source.name, "grid": grid}

    def run(self, x: int, y: int, z: int, stream: int, function: Any, meta: Any, about: Any, *rest: Any) -> None:
        self.kept.append(StartedLaunch(self, (x, y, z), stream, about, rest[:2], rest[2:]))


@contextmanager
def standing_in() -> Iterator[tuple[Device, list[StartedLaunch]]]:
    """(the driver, what is started)."""
    stand_in: Device = Device(HOPPER)
    kept: list[StartedLaunch] = []

    def compile(source: Any, target: Any = None, options: Any = None, **_: Any) -> NoKernel:
        return NoKernel(source, options, kept)

    driver.set_active(stand_in)
    with mock.patch.object(triton.compiler, "compile", compile):
        yield stand_in, kept


def tiny(T: int = 32) -> list[torch.Tensor]:
    """q, k, v, prefix_k, prefix_v of B=1, H=2, G=1, S=32, P=4, D=16: a CPU allocates such without asking the system."""
    return [torch.randn(1, heads, length, 16) for heads, length in ((2, T), (1, 32), (1, 32), (1, 4), (1, 4))]


OPTIONS: dict[str, Any] = {"scale": 0.125, "is_causal": True}
