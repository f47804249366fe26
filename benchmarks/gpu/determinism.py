"""Which engines are bitwise deterministic: outputs and each gradient, ten times."""

from __future__ import annotations

from typing import Any

from . import Settings

_RUNS = 10
_NAMES = ("out", "q", "k", "v", "prefix_k", "prefix_v")


def jobs(settings: Settings) -> list[str]:
    engines = ("triton", "cudnn", "flash") if settings.on_gpu else ("triton",)
    return [f"{engine} {D}" for engine in engines for D in ((64, 128) if settings.on_gpu else (16,))]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    import torch

    from softkv import prefix_attention

    from ..providers import AttentionProblem
    from ..shapes import Shape

    engine, D = job.split()
    shape = Shape(8, 32, 8, 1024, 256, int(D)) if settings.on_gpu else Shape(2, 2, 1, 20, 9, int(D))
    problem = AttentionProblem.random(shape, "forward + backward", settings.device, getattr(torch, settings.dtype))
    direction = torch.randn_like(problem.q)

    def results() -> list[torch.Tensor]:
        out: Any = prefix_attention(*problem.leaves, backend=engine)
        return [out.detach(), *torch.autograd.grad(out, problem.leaves, direction)]

    first, changed = results(), set()
    for _ in range(_RUNS if settings.on_gpu else 1):
        changed |= {name for name, a, b in zip(_NAMES, first, results(), strict=True) if not torch.equal(a, b)}
    return {"changed": sorted(changed), "said": f"changes: {', '.join(sorted(changed)) or 'nothing'}"}


def lines(results: dict[str, Any]) -> list[str]:
    return [f"- {job}: {record['said']}" for job, record in results.items()]
