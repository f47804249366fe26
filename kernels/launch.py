"""From a launcher to the device: one call starts a kernel, and one place knows what was started.

`Launch` is what a launcher asks for. Normally it runs at once. Inside `recording()` it is kept instead: that is how the
offline compiler (`softkv.kernels.compile`) sees exactly the signatures that launchers use, from tensors on the meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from softkv.kernels.tiles import Target, Tile

__all__ = ["Launch", "interpreter_enabled", "launch", "recording", "target_of"]


class Launch(NamedTuple):
    kernel: Any
    grid: int
    tile: Tile
    arguments: dict[str, Any]


class _Recorder:
    target: Target | None = None
    launches: list[Launch]


_recorder = _Recorder()


@torch.compiler.assume_constant_result
def interpreter_enabled() -> bool:
    """Whether TRITON_INTERPRET is on: then the kernels run on CPU tensors, slowly."""
    return bool(knobs.runtime.interpret)


def target_of(x: Tensor) -> Target:
    """The device's row of the tile table and its number of multiprocessors. Reads cached properties, never waits."""
    if _recorder.target is not None:
        return _recorder.target
    if x.device.type != "cuda":
        return Target("interpreter", 4)
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip:
        return Target("gfx942", properties.multi_processor_count)
    arch = properties.major * 10 + properties.minor
    small = arch in (86, 89)  # sm_80's matrix instructions, but 99 KiB of shared memory as sm_120
    known = 120 if arch >= 120 or small else 100 if arch >= 100 else 90 if arch >= 90 else 80
    return Target(f"sm_{known}", properties.multi_processor_count)


def launch(kernel: Any, grid: int, tile: Tile, **arguments: Any) -> None:
    if _recorder.target is not None:
        _recorder.launches.append(Launch(kernel, grid, tile, arguments))
    elif grid > 0:
        kernel[(grid,)](**arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect what launchers would launch on `target`; nothing runs."""
    _recorder.target, _recorder.launches = target, []
    try:
        yield _recorder.launches
    finally:
        _recorder.target = None
