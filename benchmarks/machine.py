"""The environment of a benchmark: the machine, the versions, the commit, and the machine's measured peak rates."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .timing import Clock

PACKAGES = ("transformers", "peft", "triton", "flash-attn", "flashinfer-python", "softkv")
_REPEATS = 5


def machine(device: str = "cpu") -> dict[str, Any]:
    import torch

    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = None
    return about


def _cpu() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor()


def commit() -> str | None:
    """The commit of the checkout that this file lies in, "+" behind it where files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_rates(device: str, dtype: str, clock: Clock, size: int, mebibytes: int) -> dict[str, float]:
    """The best of a few square products (GFLOP/s) and of a few copies (GB/s, read and written)."""
    import torch

    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    a, b, product = (torch.randn(size, size).to(**options) for _ in range(3))
    source = torch.zeros((mebibytes << 20) // a.element_size(), **options)
    target = torch.zeros_like(source)

    def best(run: Any) -> float:
        run()
        return min(clock.seconds(run, 1) for _ in range(_REPEATS))

    return {
        "gflop_per_s": 2e-9 * size**3 / best(lambda: torch.matmul(a, b, out=product)),
        "gb_per_s": 2e-9 * source.numel() * source.element_size() / best(lambda: target.copy_(source)),
    }
