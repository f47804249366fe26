"""A search for tiles: each pass with each candidate, compiled by several processes and timed under a CUDA graph; the
best ones are written as rows for `kernels/tiles.py`."""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import Settings, breaks_the_process

NEEDS = {  # the backward's passes, by the gradients asked for
    "dq": (True, False, False, False, False, False),
    "dkv": (False, True, True, False, False, False),
    "dkv_prefix": (False, False, False, True, True, False),
}
ORDER = ("forward", "dkv", "dkv_prefix", "dq")
_SAMPLES, _QUICK_SAMPLES = 12, 1


def shapes(settings: Settings) -> dict[str, Any]:
    from ..shapes import Shape

    if settings.quick:
        return {"D = 16": Shape(1, 2, 1, 20, 9, 16)}
    return {
        "D = 128": Shape(4, 32, 8, 2048, 256, 128),
        "D = 64": Shape(16, 32, 8, 2048, 256, 64),
        "D = 128, short": Shape(64, 32, 8, 256, 128, 128),
        "D = 64, short": Shape(16, 9, 3, 256, 64, 64),
    }


def candidates(settings: Settings) -> Iterator[tuple[int, int, int, int]]:
    """(own, step, warps, stages): what came out well, or was not known to come out badly, on an H200."""
    if settings.quick:
        yield from ((32, 32, 1, 1), (16, 16, 1, 1))
        return
    for (own, step), stages in itertools.product(((64, 32), (64, 64), (64, 128), (128, 32), (128, 64)), (2, 3, 4)):
        yield own, step, 4, stages
        if own == 128:
            yield own, step, 8, stages
    yield from ((own, step, 8, stages) for own, step in ((128, 128), (256, 64)) for stages in (2, 3))


def jobs(settings: Settings) -> list[str]:
    return [f"{name}: {one}" for name in shapes(settings) for one in ORDER]


def warm(settings: Settings) -> list[Callable[[], Any]]:
    """Each binary once; shapes of one head dim share them."""
    calls: list[Callable[[], Any]] = []
    for name in list(shapes(settings))[:2]:
        for one, tile in itertools.product(ORDER, candidates(settings)):
            calls.append(partial(_with_tile, name, one, tile, settings, _call))
    return calls


def _call(run: Callable[[], Any]) -> Any:
    return run()


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """Milliseconds of every candidate, the fastest first, and of the table's own tile."""
    from ..timing import clock_of

    name, one = job.split(": ")
    clock = clock_of(settings.device)

    def measured(call: Callable[[], Any]) -> float:
        graph = clock.prepared(call)
        graph()
        samples = _SAMPLES if settings.on_gpu else _QUICK_SAMPLES
        return 1e3 * statistics.median(clock.seconds(graph, 1) for _ in range(samples))

    own = _with_tile(name, one, None, settings, measured)
    times, failed = [], {}
    for tile in candidates(settings):
        try:
            times.append((*tile, _with_tile(name, one, tile, settings, measured)))
        except Exception as failure:  # does not fit this device
            failed["×".join(map(str, tile))] = f"{type(failure).__name__}: {failure}".splitlines()[0][:100]
            if breaks_the_process(failure):
                raise
    times.sort(key=lambda row: row[-1])
    best = times[0] if times else None
    said = f"table {own:.4f} ms, best {best}"
    row = best and _row(one, shapes(settings)[name].D, best, own, settings)
    return {"table_ms": own, "times": times, "failed": failed, "row": row, "said": said}


def lines(results: dict[str, Any]) -> list[str]:
    said = ["pass: the table's ms; own×step, warps, stages → ms of the best", ""]
    for job, record in results.items():
        best = ", ".join(f"{m}×{n},{w},{s} {ms:.4f}" for m, n, w, s, ms in record["times"][:3])
        said.append(f"- {job}: {record['table_ms']:.4f}; {best}")
    rows = [record["row"] for job, record in results.items() if record["row"] and "short" not in job]
    return [*said, "", "Rows of TABLE in kernels/tiles.py:", "", *rows]


def _row(one: str, D: int, best: tuple[Any, ...], own: float, settings: Settings) -> str:
    import torch

    from softkv.kernels.launch import target_of
    from softkv.kernels.tiles import block_d

    arch = target_of(torch.empty(0, device=settings.device)).arch
    where = torch.cuda.get_device_name() if settings.on_gpu else "interpreter"
    rows, step, warps, stages, ms = best
    why = f"measured, {where}, {datetime.date.today()}: {ms:.4f} ms, the row before {own:.4f}"
    return f'("{_pass_of(one)}", "{arch}"): {{{block_d(D)}: Tile({rows}, {step}, {warps}, {stages}, "{why}")}},'


def _with_tile(name: str, one: str, tile: Any, settings: Settings, use: Callable[[Callable[[], Any]], Any]) -> Any:
    """`use` a call of a pass while a tile is the table's; None leaves the table alone."""
    import torch

    import softkv.kernels as engine
    from softkv.kernels.launch import target_of
    from softkv.kernels.tiles import MEASURED, Tile, block_d

    from ..providers import AttentionProblem
    from .operands import engine_options

    shape, dtype = shapes(settings)[name], getattr(torch, settings.dtype)
    options = engine_options(shape)
    leaves = [x.detach() for x in AttentionProblem.random(shape, "forward", settings.device, dtype).leaves]
    out, lse = engine.forward(*leaves, **options)

    def call() -> Any:
        if one == "forward":
            return engine.forward(*leaves, **options)
        return engine.backward(out, None, out, lse, *leaves, needs=NEEDS[one], **options)

    key = (_pass_of(one), target_of(out).arch, block_d(shape.D), dtype)
    try:
        if tile is not None:
            MEASURED[key] = Tile(*tile, "candidate")
        return use(call)
    finally:
        MEASURED.pop(key, None)


def _pass_of(one: str) -> str:
    """The name of a pass's row in the table of tiles."""
    from softkv.kernels.tiles import INTERPRETER

    return one if one in INTERPRETER else "dkv"
