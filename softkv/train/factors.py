"""What a learning rate may be given as; read without torch."""

from __future__ import annotations

import math
import re

_FACTOR = re.compile(r"(?P<factor>[0-9.eE+-]+)x")


def factor_of(rate: float | str) -> float | None:
    """1.0 for "auto", k for "kx" (k times the method's own rates), None for a number, which is a rate.

    Raises:
        ValueError: for anything else.
    """
    if rate == "auto":
        return 1.0
    match = _FACTOR.fullmatch(str(rate))
    try:
        number = math.nan if isinstance(rate, bool) else float(match["factor"] if match else rate)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f'learning_rate expects a number above 0, "auto" (the method\'s own), or a factor on these such as "2x", '
            f"got {rate!r}"
        )
    return number if match else None
