"""Bytes that torch's allocators hold over the time of a profile, from the profiler's own allocation events."""

from __future__ import annotations

from typing import Any

import torch


def timeline(profile: Any, device: str = "cpu") -> list[tuple[float, int]]:
    """(seconds from the first event, bytes held) after each allocation and release on a kind of device.

    Args:
        profile: a `torch.profiler.profile(profile_memory=True)` that has ended.

    Memory allocated before the profile is not counted, and releasing it counts as negative.
    """
    kind = torch.device(device).type.upper()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == kind
    )
    held, points = 0, []
    for at, change in events:
        held += change
        points.append(((at - events[0][0]) / 1e9, held))
    return points


def peak(profile: Any, device: str = "cpu") -> int:
    """The most bytes held at once."""
    return max((held for _, held in timeline(profile, device)), default=0)
