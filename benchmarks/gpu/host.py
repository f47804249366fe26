"""Host time of a call by stage, compared with SDPA: `softkv profile host` on the device."""

from __future__ import annotations

from typing import Any

from . import Settings


def jobs(settings: Settings) -> list[str]:
    return ["forward", "forward + backward", "decoding"]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    from softkv.profiling.host import measure

    record = measure(job, device=settings.device, calls=20 if settings.quick else 300)
    return record | {"said": f"{record['call']:.0f} µs, {record['ratio']:.2f}× SDPA"}


def lines(results: dict[str, Any]) -> list[str]:
    from softkv.profiling.host import sentence

    return [f"- {job}: {sentence(record)}" for job, record in results.items()]
