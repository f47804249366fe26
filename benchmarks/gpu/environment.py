"""The environment of the other parts: device, versions, code."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..machine import commit
from . import Settings

PACKAGES = ("triton", "transformers", "peft", "flash-attn", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "pytest")
_CODE = Path(__file__).resolve().parents[2]


def fingerprint(settings: Settings) -> dict[str, Any]:
    """What records must share to be kept: code, device, versions, and whether the jobs are the small ones."""
    import torch

    return {
        "code": _hash_of_code(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if settings.on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "quick": settings.quick,
    }


def _hash_of_code() -> str:
    """Of every Python file of the package, so that a changed or copied tree is told apart without git."""
    digest = hashlib.sha256()
    for folder in ("softkv", "kernels", "benchmarks"):
        for path in sorted((_CODE / folder).rglob("*.py")):
            digest.update(str(path.relative_to(_CODE)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def jobs(settings: Settings) -> list[str]:
    return ["machine"]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    import torch

    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    return record


def lines(results: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in results.get("machine", {}).items() if value is not None]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
