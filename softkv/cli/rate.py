"""Learning rates and numbers of steps of `softkv train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softkv.cli.console import err, fail, out
from softkv.cli.options import pairs
from softkv.train.factors import factor_of

WARM_UP = 0.1  # of all steps
LEAST_STEPS = 200  # if neither steps nor epochs are given, so that few rows are read several times


def checked_rate(learning_rate: str, arg: list[str] | None) -> float | str:
    """--learning-rate, unless --arg overrides it."""
    given = {name.replace("-", "_"): text for name, text in pairs(arg, "--arg", parse=False).items()}
    text = given.get("learning_rate", learning_rate)
    try:
        return float(text) if factor_of(text) is None else text
    except ValueError as error:
        fail(f"--{str(error).replace('_', '-')}")


def default_steps(rows: int, rows_a_step: int) -> int:
    """The default number of steps: one epoch, or as many as make 200 steps."""
    return max(LEAST_STEPS, -(-rows // rows_a_step))


def propose(trainer: Any, learning_rate: float | str, output: Path) -> None:
    """Print the rate that a range test proposes, and plot its curve."""
    from softkv.train.range_test import draw, range_test

    result = range_test(trainer)
    if not result.fell:
        fail("the loss fell at no learning rate: does any label depend on what is learned? (softkv inspect, more rows)")
    number = learning_rate if isinstance(learning_rate, float) else None
    factor = trainer.rate_factor or 1.0
    proposed = f"{number * result.best:.2g}" if number is not None else f"{factor * result.best:.2g}x"
    out.print(f"--learning-rate {proposed}   (auto is 1x)" if number is None else f"--learning-rate {proposed}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        draw(result, output / "learning_rates.png")
        out.print(f"Loss by rate: {output / 'learning_rates.png'}", soft_wrap=True)
    except ModuleNotFoundError:
        err.print("no curve is drawn without matplotlib: pip install 'softkv[plots]'")
