"""Working memory of one call: its peak above the level before it, including results and gradients.

On CPUs the call runs in a separate process, whose peak is read from the operating system (Linux); on GPUs the allocator
keeps count.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from .providers import PROVIDERS, AttentionProblem
from .shapes import AttentionCase


def working_mib(case: AttentionCase, provider: str, variant: str, device: str, dtype: str) -> float | None:
    """MiB, or None where the system doesn't tell."""
    if device == "cuda":
        step = _step(case, provider, variant, device, dtype)
        step()
        return allocated_mib(step)
    if sys.platform != "linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._inductor.compile_fx"])  # imported once, not in each process
    ours, theirs = context.Pipe()
    arguments = (theirs, case, provider, variant, dtype, torch.get_num_threads())
    process = context.Process(target=_resident, args=arguments)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{provider} at {case.name}: the process that measures memory ended early") from None
    finally:
        process.join()


def _step(case: AttentionCase, provider: str, variant: str, device: str, dtype: str) -> Callable[[], object]:
    problem = AttentionProblem.random(case.shape, case.mode, device, getattr(torch, dtype))
    chosen = PROVIDERS[provider]
    leaves = problem.leaves if chosen.prefix else problem.leaves[:3]
    return problem.step(chosen.variants[variant](problem), torch.randn_like(problem.q), leaves)


def allocated_mib(step: Callable[[], object]) -> float:
    """What torch's allocator held on the GPU at most during a call, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident(pipe: Connection, case: AttentionCase, provider: str, variant: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    step = _step(case, provider, variant, "cpu", dtype)
    step()  # libraries set themselves up
    pipe.send(min(_grown(step) for _ in range(2)) / 1024)


def _grown(step: Callable[[], object]) -> int:
    """KiB that this process grew by, at most, during a call. Pages of libraries that the system had taken away may come
    back meanwhile, hence the lesser of two."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """KiB of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
