"""The op at the shapes of models: device time under a CUDA graph, eager time, work per second, working memory; compared
with concatenation with torch's flash and cuDNN attention and with FlexAttention, and with the floors without a prefix.
Passes of the backward are timed separately, by asking the engine for one gradient."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import Settings, breaks_the_process

PASSES = {  # which gradients of (q, k, v, prefix_k, prefix_v, sinks): the statistics are made in each
    "dq": (True, False, False, False, False, False),
    "dkv": (False, True, True, False, False, False),
    "dprefix": (False, False, False, True, True, False),
}
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "dprefix": 4}
_SECONDS = 0.25  # of samples a job and mode
_EAGER_CALLS = 10
TOLERANCE = 2e-2  # of the norm of softkv's result: what a peer may differ by in bfloat16


def jobs(settings: Settings) -> list[str]:
    return [f"{mode}: {shape}" for mode, shape in _all(settings)]


def _all(settings: Settings) -> list[tuple[str, Any]]:
    from . import operands

    shapes = operands.QUICK if settings.quick else operands.SHAPES
    return [(mode, shape) for mode, some in shapes.items() for shape in some]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    shape = next(shape for mode, shape in _all(settings) if job == f"{mode}: {shape}")
    if job.startswith("decoding"):
        return {"shape": vars(shape), "decoding": _measure(shape, "decoding", settings)}
    modes = {mode: _measure(shape, mode, settings) for mode in ("forward", "forward + backward")}
    return {"shape": vars(shape), **modes, "passes": _passes(shape, settings)}


def warm(settings: Settings) -> list[Callable[[], Any]]:
    """A call of each way: binaries, and FlexAttention's."""
    calls: list[Callable[[], Any]] = []
    for kind, shape in _all(settings):
        for mode in ("decoding",) if kind == "decoding" else ("forward + backward", "forward"):
            calls += [partial(_once, shape, mode, name, settings) for name in _COMPILED]
    return calls


_COMPILED = ("softkv triton", "cat + flex", "softkv, no prefix")


def _once(shape: Any, mode: Any, name: str, settings: Settings) -> None:
    import torch

    problem = _problem(shape, mode, settings)
    from .operands import ways

    make, prefix = ways(problem)[name]
    problem.step(make(), torch.randn_like(problem.q), problem.leaves if prefix else problem.leaves[:3])()
    torch.cuda.empty_cache()


def _problem(shape: Any, mode: Any, settings: Settings) -> Any:
    import torch

    from ..providers import AttentionProblem

    return AttentionProblem.random(shape, mode, settings.device, getattr(torch, settings.dtype))


def _measure(shape: Any, mode: Any, settings: Settings) -> dict[str, Any]:
    import torch

    from ..memory import allocated_mib
    from ..timing import clock_of, interleaved
    from .operands import ways

    clock, problem = clock_of(settings.device), _problem(shape, mode, settings)
    direction = torch.randn_like(problem.q)
    steps, graphs, found, absent = {}, {}, {}, {}
    ours: list[Any] = []
    for name, (make, prefix) in ways(problem).items():
        try:
            step = problem.step(make(), direction, problem.leaves if prefix else problem.leaves[:3])
            got = step()
            if prefix and not ours:
                ours = got
            differs = max(_distance(a, b) for a, b in zip(got, ours, strict=True)) if prefix else None
            if differs is not None and not differs <= TOLERANCE:
                absent[name] = f"differs by {differs:.1e}"
                continue
            graphs[name] = clock.prepared(step)
            found[name] = {"differs": differs, "mib": allocated_mib(step) if settings.on_gpu else None}
            steps[name] = step
        except Exception as failure:  # a peer's own, or an engine's refusal
            absent[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:160]
            if breaks_the_process(failure):
                raise
    times = interleaved(graphs, hot=False, clock=clock, **_rounds(settings)) if graphs else {}
    for name, one in found.items():
        prefix = one["differs"] is not None
        gflop = (shape if prefix else shape.without_prefix()).gflop(mode)
        ms = statistics.median(times[name])
        one |= {"ms": ms, "tflops": gflop / ms, "eager_ms": _eager(steps[name], settings)}
    return {"ways": found, "absent": absent}


def _rounds(settings: Settings) -> dict[str, Any]:
    return {"seconds": _SECONDS, "at_least": 3, "at_most": 30} if settings.on_gpu else {"at_least": 1, "at_most": 1}


def _distance(a: Any, b: Any) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def _eager(step: Callable[[], Any], settings: Settings) -> float:
    """Milliseconds of a call among calls, host and device, whichever is longer."""
    from softkv.profiling.host import wait

    step()
    wait(settings.device)
    start = time.perf_counter()
    for _ in range(_EAGER_CALLS if settings.on_gpu else 1):
        step()
    wait(settings.device)
    return 1e3 * (time.perf_counter() - start) / (_EAGER_CALLS if settings.on_gpu else 1)


def _passes(shape: Any, settings: Settings) -> dict[str, Any]:
    import softkv.kernels as engine

    from ..timing import clock_of, interleaved
    from .operands import engine_options

    clock, options = clock_of(settings.device), engine_options(shape)
    problem = _problem(shape, "forward", settings)
    leaves = [x.detach() for x in problem.leaves]
    out, lse = engine.forward(*leaves, **options)
    calls: dict[str, Callable[[], Any]] = {"forward": partial(engine.forward, *leaves, **options)}
    for name, needs in PASSES.items():
        calls[name] = partial(engine.backward, out, None, out, lse, *leaves, needs=needs, **options)
    graphs = {name: clock.prepared(call) for name, call in calls.items()}
    times = interleaved(graphs, hot=False, clock=clock, **_rounds(settings))
    pairs = {"dkv": shape.T * (shape.T + 1) // 2, "dprefix": shape.T * shape.P}
    work = {name: 2e-9 * shape.D * shape.B * shape.H * count for name, count in pairs.items()}
    work |= dict.fromkeys(("forward", "dq"), sum(work.values()))
    return {
        name: {"ms": (ms := statistics.median(sample)), "tflops": _PRODUCTS[name] * work[name] / ms}
        for name, sample in times.items()
    }


def lines(results: dict[str, Any]) -> list[str]:
    """A row a shape and mode, a column a way; what did not run, and why, below."""
    modes = [
        (record, mode, record[mode])
        for record in results.values()
        for mode in ("forward", "forward + backward", "decoding")
        if mode in record
    ]
    names = list(dict.fromkeys(name for *_, found in modes for name in found["ways"]))
    said = [
        "Milliseconds by graph, TFLOP/s of useful work; eager: milliseconds of softkv triton; MiB: its, cat + flash's.",
        "",
        f"| B,H,G,T,P,D | mode | {' | '.join(names)} | eager | MiB |",
        "|" + "---|" * (len(names) + 4),
    ]
    for record, mode, found in modes:
        ways = found["ways"]
        cells = [f"{ways[name]['ms']:.3f} {ways[name]['tflops']:.0f}" if name in ways else "–" for name in names]
        eager = f"{ways['softkv triton']['eager_ms']:.3f}" if "softkv triton" in ways else "–"
        memory = [ways[name]["mib"] for name in ("softkv triton", "cat + flash") if name in ways]
        mib = "–" if None in memory else ", ".join(f"{one:.0f}" for one in memory)
        short = {"forward": "f", "forward + backward": "fb", "decoding": "d"}[mode]
        said.append(f"| {_axes(record)} | {short} | {' | '.join(cells)} | {eager} | {mib} |")
    said.append("")
    for record in results.values():
        if "passes" in record:
            alone = (f"{one} {x['ms']:.3f} ({x['tflops']:.0f})" for one, x in record["passes"].items())
            said.append(f"- {_axes(record)}, passes with their statistics: {'; '.join(alone)}")
    absent: dict[str, str] = {}
    for *_, found in modes:
        absent = found["absent"] | absent
    return [*said, *(f"- {name} did not run somewhere: {why[:100]}" for name, why in absent.items())]


def _axes(record: dict[str, Any]) -> str:
    shape = record["shape"]
    return ",".join(str(shape[axis]) for axis in "BHGTPD") + (f" S={shape['S']}" if shape["S"] else "")
