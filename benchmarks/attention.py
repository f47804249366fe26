"""The op compared with what it replaces, for the shapes of `shapes.py` and the providers of `providers.py`.

Every provider's results are compared with the reference before timing; the variant of a provider that is fastest in a
short trial is timed. Decoding is timed cold (single calls, with the others' in between) and hot (consecutive calls);
longer calls cold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from softkv.ops.reference import reference_attention

from .machine import machine, peak_rates
from .memory import working_mib
from .providers import OURS, PROVIDERS, AttentionProblem, Unavailable
from .shapes import CPU, CUDA, QUICK, AttentionCase, Sweep
from .timing import Clock, clock_of, fastest, interleaved, summary

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of the largest number in a result
_TRIAL_ROUNDS = 2


@dataclass(frozen=True)
class AttentionSettings:
    """How cases are measured; all of it is in the results."""

    device: str
    dtype: str
    seconds: float

    @classmethod
    def of(cls, device: str, quick: bool) -> AttentionSettings:
        return cls(device, "bfloat16" if device == "cuda" else "float32", 0.01 if quick else 1.0)


@dataclass(frozen=True)
class Ready:
    """A provider's fastest variant, and by how much its results differ from the oracle's."""

    step: Callable[[], Any]
    variant: str
    error: float


def sweeps(device: str, quick: bool) -> dict[str, Sweep]:
    return QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]


def run(
    cases: list[AttentionCase], settings: AttentionSettings, command: str, quick: bool = False
) -> Iterator[tuple[str, Any]]:
    """(name, record) of each case."""
    clock = clock_of(settings.device)
    about = {"machine": machine(settings.device), "command": command, "settings": asdict(settings)}
    peak: dict[str, float] = {}  # tiny sizes say nothing about it
    sweep = None
    for case in cases:
        if case.sweep != sweep and not quick:
            sweep = case.sweep
            seen = peak_rates(settings.device, settings.dtype, clock, size=2048, mebibytes=256)
            peak = {name: max(rate, peak.get(name, 0)) for name, rate in seen.items()}
        yield case.name, measure(case, settings, clock) | about | {"peak": peak}


def measure(case: AttentionCase, settings: AttentionSettings, clock: Clock) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    problem = AttentionProblem.random(case.shape, case.mode, settings.device, dtype)
    direction = torch.randn_like(problem.q)
    ready, absent = prepare(problem, direction, TOLERANCE[settings.dtype], clock)
    steps = {name: one.step for name, one in ready.items()}
    ours = OURS[settings.device]
    timed = {"cold": interleaved(steps, settings.seconds, hot=False, clock=clock)}
    if case.mode == "decoding":
        timed["hot"] = interleaved(steps, settings.seconds, hot=True, clock=clock)
    summaries = {kind: summary(times, ours) for kind, times in timed.items()}
    providers = {}
    for name, one in ready.items():
        shape = case.shape if PROVIDERS[name].prefix else case.shape.without_prefix()
        providers[name] = {
            "variant": one.variant,
            "error": one.error,
            "gflop": shape.gflop(case.mode),
            "mbyte": shape.mbyte(case.mode, dtype.itemsize),
            "working_mib": working_mib(case, name, one.variant, settings.device, settings.dtype),
            **{kind: of[name] for kind, of in summaries.items()},
        }
    return {
        "case": {"sweep": case.sweep, "mode": case.mode, "shape": asdict(case.shape)},
        "ours": ours,
        "rounds": {kind: len(times[ours]) for kind, times in timed.items()},
        "providers": providers,
        "absent": absent,
    }


def prepare(
    problem: AttentionProblem, direction: Tensor, tolerance: float, clock: Clock
) -> tuple[dict[str, Ready], dict[str, str]]:
    """The providers that can run and are right, and why the others can't or aren't."""
    ready, absent = {}, {}
    wanted = {prefix: oracle(problem, direction, prefix) for prefix in (True, False)}
    for name, provider in PROVIDERS.items():
        if problem.mode not in provider.modes:
            continue
        leaves = problem.leaves if provider.prefix else problem.leaves[:3]
        right, reasons = {}, {}
        for variant, build in provider.variants.items():
            try:
                step = problem.step(build(problem), direction, leaves)
                error = largest_error(step(), wanted[provider.prefix])
                if not error <= tolerance:  # NaN too
                    raise Unavailable(f"differs from the oracle by {error:.1e}, allowed {tolerance:.0e}")
                right[variant] = Ready(clock.prepared(step), variant, error)
            except Unavailable as reason:
                reasons[variant] = str(reason)
            except Exception as failure:  # a peer's own: whatever it is, it is the reason
                reasons[variant] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        if right:
            trial = {variant: one.step for variant, one in right.items()}
            ready[name] = right[_fastest_of(trial, clock)]
        else:
            absent[name] = "; ".join(dict.fromkeys(reasons.values()))
    if OURS[problem.q.device.type] in absent:
        raise RuntimeError(f"softkv failed at {problem.shape}, {problem.mode}: {absent[OURS[problem.q.device.type]]}")
    return ready, absent


def _fastest_of(trial: dict[str, Callable[[], Any]], clock: Clock) -> str:
    if len(trial) == 1:
        return next(iter(trial))
    return fastest(interleaved(trial, 0, at_least=_TRIAL_ROUNDS, at_most=_TRIAL_ROUNDS, hot=False, clock=clock))


def oracle(problem: AttentionProblem, direction: Tensor, prefix: bool) -> list[Tensor]:
    """What a step has to give, in float64, row by row."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in problem.leaves[: 5 if prefix else 3]]
    outs = []
    for b in range(problem.shape.B):
        q, k, v = (x[b : b + 1] for x in exact[:3])
        index = None if problem.index is None or not prefix else problem.index[b : b + 1]
        out, _ = reference_attention(q, k, v, *exact[3:], prefix_index=index)
        if problem.mode == "forward + backward":
            out.backward(direction[b : b + 1].double())
        outs.append(out.detach())
    gradients = [x.grad for x in exact if x.grad is not None]
    return [torch.cat(outs), *gradients]


def largest_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference in any result, as a part of the largest number in it."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, wanted, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any is
