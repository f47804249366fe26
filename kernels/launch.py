"""Launching: `Launch` runs one kernel, `Plan` a whole call, and `recording` collects launches without running them.

A plan depends on shapes, strides, dtypes, alignment and options only: what to allocate, and which kernels to launch,
with their grids and all arguments except addresses. It is made at the first call of its kind and cached, and holds no
tensor. The first launch goes through Triton's JIT, which binds, specialises and compiles; later ones pass the addresses
to the compiled kernel. The stream, Triton's launch hooks and the addresses are looked up at every launch.

Inside `recording()` launches are recorded instead of run, which gives the offline compiler exactly the signatures that
are launched, from tensors on the meta device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from softkv.kernels.geometry import Operands
from softkv.kernels.tiles import Target, Tile

INTERPRETED = bool(knobs.runtime.interpret)  # fixed when this package is imported and kernels are decorated
Tensors = dict[str, Any]  # the tensors of a call by field of `Operands`, None if absent


class Recorded(NamedTuple):
    kernel: Any
    grid: int
    tile: Tile
    arguments: dict[str, Any]


class _Recorder:
    target: Target | None = None
    launches: list[Recorded]


_recorder = _Recorder()


@torch.compiler.assume_constant_result
def interpreter_enabled() -> bool:
    """Whether TRITON_INTERPRET is set, which runs the kernels slowly on CPU tensors."""
    return bool(knobs.runtime.interpret)


def target_of(x: Tensor) -> Target:
    """The device's architecture in the tile table and its number of multiprocessors, from cached properties, without
    synchronising."""
    if _recorder.target is not None:
        return _recorder.target
    if x.device.type != "cuda":
        return Target("interpreter", 4)
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip:
        return Target("gfx942", properties.multi_processor_count)
    arch = properties.major * 10 + properties.minor
    small = arch in (86, 89)  # sm_80's matrix instructions, but 99 KiB of shared memory like sm_120
    known = 120 if arch >= 120 or small else 100 if arch >= 100 else 90 if arch >= 90 else 80
    return Target(f"sm_{known}", properties.multi_processor_count)


def recording_target() -> Target | None:
    return _recorder.target


def _asked_for(hook: Any) -> Any:
    """A launch hook, or None if its chain is empty, because calling an empty chain takes time too."""
    return hook if hook is not None and getattr(hook, "calls", True) else None


class Launch:
    """One kernel on `grid` programs. Every argument is fixed except the addresses in `ptr`, of which only the fields
    are."""

    def __init__(self, kernel: Any, grid: int, tile: Tile, pointers: dict[str, str], **arguments: Any):
        self.kernel, self.grid, self.tile = kernel, grid, tile
        self.pointers = [(Operands._fields.index(field), name) for field, name in pointers.items()]
        self.arguments = arguments
        self.compiled: Any = None
        self.settled: tuple[Any, ...] = ()  # the arguments after `ptr`, which is first in all kernels

    def __call__(self, x: Tensors) -> None:
        if _recorder.target is not None:
            arguments = {"ptr": self.operands(x), **self.arguments}
            _recorder.launches.append(Recorded(self.kernel, self.grid, self.tile, arguments))
        elif self.grid > 0:
            if self.compiled is None or self.kernel.pre_run_hooks:
                self.through_the_jit(x)
            else:
                self.start(x)

    def operands(self, x: Tensors) -> Operands:
        return Operands(**{Operands._fields[i]: x[name] for i, name in self.pointers})

    def through_the_jit(self, x: Tensors) -> None:
        kernel = self.kernel[(self.grid,)](
            ptr=self.operands(x), **self.arguments,
            num_warps=self.tile.warps, num_stages=self.tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if isinstance(self.kernel, JITFunction):  # the interpreter compiles nothing
            self.settled = tuple(self.arguments[name] for name in self.kernel.arg_names[1:])
            self.compiled = kernel

    def start(self, x: Tensors) -> None:
        addresses: list[int | None] = [None] * len(Operands._fields)
        for i, name in self.pointers:
            tensor = x[name]
            if tensor is not None:
                addresses[i] = tensor.data_ptr()
        compiled, active = self.compiled, driver.active
        stream = active.get_current_stream(active.get_current_device())
        enter, leave = _asked_for(knobs.runtime.launch_enter_hook), _asked_for(knobs.runtime.launch_exit_hook)
        arguments = (tuple(addresses), *self.settled)
        about = None if enter is leave is None else compiled.launch_metadata((self.grid,), stream, *arguments)
        compiled.run(
            self.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, about, enter, leave, *arguments
        )


class Memory(NamedTuple):
    """A tensor to allocate."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """A call: allocate `memory`, run `steps` in order (launches and a few torch operations), return `results`."""

    memory: dict[str, Memory]
    steps: list[Callable[[Tensors], None]]
    results: tuple[str, ...]

    def run(self, x: Tensors) -> tuple[Any, ...]:
        like = x["q"]
        for name, (shape, stride, dtype) in self.memory.items():
            x[name] = like.new_empty_strided(shape, stride, dtype=dtype)
        for step in self.steps:
            step(x)
        return tuple(x.get(name) for name in self.results)


@contextmanager
def recording(target: Target) -> Iterator[list[Recorded]]:
    """Collect the launches for `target` without running them."""
    _recorder.target, _recorder.launches = target, []
    try:
        yield _recorder.launches
    finally:
        _recorder.target = None
