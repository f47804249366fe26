"""The op of each engine against the float64 reference: outputs, lse and every gradient; then the project's own
tests."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import Settings

_ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(
    f"test_{name}.py" for name in ("kernels", "operator", "methods_on_kernels", "tuning", "workspace", "library")
)
_SHARD = "softkv.benchmarks.gpu.shard"
_PYTEST = ("-p", "no:cacheprovider", "-rf", "--tb=line")
_END = re.compile(r"(\d+) (passed|failed|error|errors|skipped|xfailed)")

# Name → (engines, axes and options). Lengths that meet the edges of tiles; D as models have them.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "D = 128": (("triton", "cudnn", "flash"), {"T": 333, "P": 77, "D": 128}),
    "D = 64, groups of four": (("triton", "cudnn", "flash"), {"T": 256, "P": 128, "D": 64, "H": 8}),
    "a prefix a row": (("triton", "cudnn", "flash"), {"T": 130, "P": 33, "D": 128, "A": 3}),
    "not causal": (("triton", "cudnn", "flash"), {"T": 130, "P": 33, "D": 128, "is_causal": False}),
    "sinks": (("triton", "cudnn", "flash"), {"T": 200, "P": 40, "D": 64, "sinks": True}),
    "packed": (("triton", "flash"), {"lengths": (200, 1, 77, 130), "P": 128, "D": 64}),
    "packed, a prefix a row": (("triton", "flash"), {"lengths": (200, 1, 77), "P": 65, "D": 128, "A": 3}),
    "packed bank": (("triton",), {"lengths": (200, 1, 77, 130), "P": 128, "D": 64, "A": 3, "index": True}),
    "window": (("triton", "flash"), {"T": 333, "P": 77, "D": 128, "window": 100}),
    "window over the prefix": (("triton",), {"T": 200, "P": 128, "D": 64, "window": 150, "covers": True}),
    "padding": (("triton",), {"T": 200, "P": 40, "D": 64, "padding": True}),
    "scores near -150": (("triton", "cudnn", "flash"), {"T": 320, "P": 64, "D": 64, "low": True}),
    "soft cap": (("triton",), {"T": 200, "P": 40, "D": 128, "softcap": 20.0}),
    "one query": (("triton", "flash"), {"T": 1, "S": 300, "P": 500, "D": 128}),
    "one query, bank": (("triton",), {"T": 1, "S": 300, "P": 500, "D": 64, "A": 3, "index": True}),
}
_QUICK = "small"
_SMALL: dict[str, Any] = {"T": 20, "P": 9, "D": 16}


def jobs(settings: Settings) -> list[str]:
    named = [f"{engine}: {name}" for name, (engines, _) in CASES.items() for engine in engines]
    if settings.quick:
        return [f"triton: {_QUICK}"]
    return [*named, "tests"]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    if job == "tests":
        return _tests(settings, seconds)
    engine, name = job.split(": ", 1)
    return compare(engine, _SMALL if name == _QUICK else CASES[name][1], settings)


def warm(settings: Settings) -> list[Callable[[], Any]]:
    triton = [name for name, (engines, _) in CASES.items() if "triton" in engines]
    return [partial(compare, "triton", CASES[name][1], settings) for name in triton]


def lines(results: dict[str, Any]) -> list[str]:
    compared = {job: record for job, record in results.items() if "errors" in record}
    wrong = [f"- {job}: {', '.join(record['wrong'])}" for job, record in compared.items() if record["wrong"]]
    said = [f"{len(compared) - len(wrong)} of {len(compared)} calls agree with the float64 oracle.", *wrong]
    if "tests" in results:
        said += [f"tests: {results['tests']['said']}", *(f"- {one}" for one in results["tests"]["failed"][:20])]
    return said


def compare(engine: str, axes: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The errors of each result, and which exceed a few times those of the oracle in the same dtype plus rounding."""
    import torch

    dtype = getattr(torch, settings.dtype)
    leaves, options, op = _operands(dict(axes), settings)

    def results(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        own = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
        out, lse = op(**own, **options, backend=backend, return_lse=True)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, list(own.values()), direction)
        return {"out": out, "lse": lse, **dict(zip(own, grads, strict=True))}

    exact, got, peer = results("reference", torch.float64), results(engine, dtype), results("reference", dtype)
    errors, wrong = {}, []
    for name, want in exact.items():
        error, allowed = (_errors(x[name], want) for x in (got, peer))
        errors[name] = error
        eps = torch.finfo(dtype).eps
        rounding = (2 * eps + 1e-6, 16 * eps * max(1.0, want.abs().max().item()))
        most = [factor * one + plus for factor, one, plus in zip((2, 4), allowed, rounding, strict=True)]
        if not all(one <= limit for one, limit in zip(error, most, strict=True)):  # NaN too
            wrong.append(f"{name} off by {error[1]:.1e}, the oracle in {settings.dtype} by {allowed[1]:.1e}")
    return {"errors": errors, "wrong": wrong, "said": "; ".join(wrong) or "agrees"}


def _errors(got: Any, want: Any) -> tuple[float, float]:
    """Of a result: relative to its norm, and the largest."""
    difference = got.double() - want
    return (difference.norm() / want.norm()).item(), difference.abs().max().item()


def _operands(axes: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], dict[str, Any], Any]:
    import torch

    from softkv import prefix_attention, prefix_attention_varlen

    generator = torch.Generator().manual_seed(0)
    on = settings.device
    B, H, G, A, P, D = 3, axes.pop("H", 4), 2, axes.pop("A", 1), axes.pop("P"), axes.pop("D")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(on, getattr(torch, settings.dtype))

    lengths = axes.pop("lengths", None)
    options: dict[str, Any] = {}
    leaves: dict[str, torch.Tensor]
    if lengths is None:
        T = axes.pop("T")
        S = axes.pop("S", T)
        leaves = {"q": normal(B, T, H, D).transpose(1, 2), "k": normal(B, G, S, D), "v": normal(B, G, S, D)}
        if axes.pop("padding", False):
            options["key_mask"] = torch.arange(S, device=on) >= torch.tensor([[0], [50], [10]], device=on)
    else:
        leaves = {"q": normal(sum(lengths), H, D), "k": normal(sum(lengths), G, D), "v": normal(sum(lengths), G, D)}
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(on)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        B = len(lengths)
    leaves |= {"prefix_k": normal(A, G, P, D), "prefix_v": normal(A, G, P, D)}
    if axes.pop("low", False):  # exp(0 - lse) overflows: padding that counts as a score of 0 shows
        leaves["q"] = leaves["q"] + 4.3
        leaves |= {name: leaves[name] - 4.3 for name in ("k", "prefix_k")}
    if axes.pop("sinks", False):
        leaves["sinks"] = normal(H)
    if axes.pop("index", False):
        options["prefix_index"] = torch.tensor([2, -1, 0, 2][:B], device=on)
    if axes.pop("covers", False):
        options["window_covers_prefix"] = True
    return leaves, options | axes, prefix_attention if lengths is None else prefix_attention_varlen


def _tests(settings: Settings, seconds: float) -> dict[str, Any]:
    """pytest over the kernels' tests, in as many processes as there are cores."""
    missing = None if importlib.util.find_spec("pytest") else "pytest"
    if missing or not (_ROOT / "tests").is_dir():
        return {"said": f"not run: {missing or 'tests/'} is not here", "failed": []}
    deadline, count = time.monotonic() + seconds - 2, settings.processes
    files = [str(path) for name in TESTS if (path := _ROOT / "tests" / "kernels" / name).exists()]
    with tempfile.TemporaryDirectory() as folder:
        reports, processes = [], []
        for shard in range(count):
            reports.append(Path(folder) / f"{shard}.txt")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                _SHARD,
                "-p",
                "no:cacheprovider",
                "-rf",
                "--tb=line",
                *files,
            ]
            environment = os.environ | {"SOFTKV_SHARD": f"{shard}/{count}", "OMP_NUM_THREADS": "1"}
            with reports[-1].open("w") as report:
                processes.append(
                    subprocess.Popen(command, stdout=report, stderr=subprocess.STDOUT, env=environment, cwd=_ROOT)
                )
        late = 0
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late += 1
        texts = [report.read_text(errors="replace") for report in reports]
    return summary(texts, late)


def summary(texts: list[str], late: int = 0) -> dict[str, Any]:
    """What pytest's processes reported: counts, and the tests that failed."""
    counts: dict[str, int] = {}
    failed, silent = [], []
    for text in texts:
        ends = [line for line in text.splitlines() if _END.search(line) and " in " in line]
        for number, what in _END.findall(ends[-1]) if ends else ():
            counts[what] = counts.get(what, 0) + int(number)
        failed += [line[len("FAILED ") :][:160] for line in text.splitlines() if line.startswith("FAILED ")]
        if not ends and "no tests ran" not in text and "deselected" not in text:
            silent.append((text.strip().splitlines() or ["said nothing"])[-1][:160])
    said = ", ".join(f"{number} {what}" for what, number in sorted(counts.items())) or "none ran"
    if late:
        said += f"; {late} of {len(texts)} processes were stopped, their time was over"
    return {"said": said, "counts": counts, "failed": [*failed, *silent], "late": late}
