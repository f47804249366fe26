"""`python -m softkv.benchmarks.gpu`: `softkv bench gpu` without the command line's dependencies."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from . import PARTS, Settings
from .conductor import FULL_MINUTES, conduct


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m softkv.benchmarks.gpu", description="Measure softkv on a GPU.")
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="total time (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for the results (%(default)s)")
    parser.add_argument("--part", action="append", default=[], choices=[part.name for part in PARTS])
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16), help="processes")
    parser.add_argument("--again", action="store_true", help="repeat the measurements of earlier runs")
    parser.add_argument("--quick", action="store_true", help="tiny jobs on the CPU, kernels in Triton's interpreter")
    chosen = parser.parse_args()
    try:
        settings = settings_of(chosen.quick, chosen.processes)
    except ValueError as failure:
        parser.error(str(failure))
    say = partial(print, flush=True)
    print(conduct(settings, chosen.output, chosen.minutes, chosen.part, chosen.again, say))


def settings_of(quick: bool, processes: int) -> Settings:
    """ValueError without a GPU, unless the jobs are the small ones."""
    import torch

    if not quick and not torch.cuda.is_available():
        raise ValueError("bench gpu: expected a CUDA or ROCm device, got none; --quick shows on a CPU that it works")
    return Settings("cpu" if quick else "cuda", quick, processes)


if __name__ == "__main__":
    main()
