"""`softkv bench gpu`: all measurements that need a GPU, in ten minutes and in order of importance.

A part is a module of this package with

    jobs(settings) -> names, in order of importance run(job, settings, seconds) -> a record: numbers, text, lists and
    dicts of them lines(results) -> the part's section of the table warm(settings) -> optional: calls that compile what
    the jobs need, run by several processes

Each part runs in a separate process with its own time limit; a record is on disk before the next job begins, and
records made by the same code on the same device are reused (`conductor`). Needs torch, triton, transformers, peft and
softkv: `python -m softkv.benchmarks.gpu` in a source tree needs no installation, and no typer, rich, psutil or
matplotlib. `correctness` also runs the kernels' tests if pytest is installed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Where the parts run, and how large their jobs are."""

    device: str
    quick: bool
    processes: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.on_gpu else "float32"


_BROKEN = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure")


def breaks_the_process(failure: object) -> bool:
    """Whether nothing runs on the device any more in the process where this went wrong."""
    return any(sign in str(failure) for sign in _BROKEN)


@dataclass(frozen=True)
class BenchmarkPart:
    """A module of this package, and the seconds that it may take of nine minutes."""

    name: str
    seconds: float
    title: str
    interpreted: bool = True  # on a CPU the kernels run in Triton's interpreter

    @property
    def module(self) -> str:
        return f"{__name__}.{self.name}"


PARTS = (
    BenchmarkPart("environment", 5, "Environment"),
    BenchmarkPart("correctness", 140, "Correctness"),
    BenchmarkPart("host", 25, "Host time of a call", interpreted=False),
    BenchmarkPart("passes", 100, "The op, by CUDA graph"),
    BenchmarkPart("models", 120, "Training and generating, random Llamas"),
    BenchmarkPart("tiles", 85, "Tiles"),
    BenchmarkPart("compiled", 40, "A compiled training step"),
    BenchmarkPart("determinism", 15, "Bits of repeated gradients"),
)
