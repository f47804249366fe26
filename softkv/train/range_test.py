"""A learning-rate range test (L. Smith 2017, arXiv:1506.01186): in a short run with a growing rate, the loss shows
which rates learn fastest and which diverge."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DefaultFlowCallback, TrainerCallback

from softkv.methods.initial import check_positive

LOWEST, HIGHEST = 1e-2, 1e2  # factors on the rates that the run is set up with
SMOOTHING = 0.9  # of the running mean of losses
BROKEN = 2.0  # times the lowest loss: the run has diverged


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        factors: the factor on the rates at each step.
        losses: the smoothed loss of each step.
    """

    factors: list[float]
    losses: list[float]

    @property
    def best(self) -> float:
        """A third of the factor with the lowest smoothed loss, where the rate is about to become too high."""
        return self.factors[min(range(len(self.losses)), key=self.losses.__getitem__)] / 3

    @property
    def fell(self) -> bool:
        """Whether the loss fell at any rate."""
        return min(self.losses) < 0.98 * self.losses[0]


class _Grow(TrainerCallback):
    """Multiplies the rates at each step, collects the losses, and stops a run that diverges."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.factors: list[float] = []
        self.losses: list[float] = []
        self._mean = 0.0

    def factor(self, step: int) -> float:
        return LOWEST * (HIGHEST / LOWEST) ** (step / max(1, self.steps - 1))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])  # type: ignore[index]
        seen = len(self.losses) + 1
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        smooth = self._mean / (1 - SMOOTHING**seen)  # corrects for the start at 0
        if not math.isfinite(loss) or (seen > 5 and smooth > BROKEN * min(self.losses)):
            control.should_training_stop = True
            return
        self.factors.append(self.factor(seen - 1))
        self.losses.append(smooth)


def range_test(trainer: Any, steps: int = 60) -> RangeTest:
    """Run a trainer for `steps` steps with rates growing from a hundredth to a hundred times its own, then restore all
    learned values. Nothing is saved or evaluated.

    Args:
        trainer: a `softkv.Trainer` before training.
        steps: the length of the test.

    Raises:
        ValueError: when steps is no number of steps, or not even the first step gives a finite loss.
    """
    check_positive("steps", steps)
    grow = _Grow(steps)
    before = copy.deepcopy(trainer.model.state_dict())
    arguments = trainer.args
    trainer.args = copy.copy(arguments)
    for name, value in {
        "max_steps": steps,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }.items():
        setattr(trainer.args, name, value)
    callbacks = trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = [DefaultFlowCallback(), grow]
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, grow.factor)
    try:
        transformers.Trainer.train(trainer)
    finally:
        trainer.model.load_state_dict(before)
        trainer.args, trainer.callback_handler.callbacks = arguments, callbacks
        trainer.optimizer = trainer.lr_scheduler = None
    if not grow.losses:
        raise ValueError("the loss of the range test's first step is not finite: check the rows and the base")
    return RangeTest(grow.factors, grow.losses)


def draw(result: RangeTest, path: str | os.PathLike[str]) -> None:
    """Plot the loss against the factor on the rates, with the proposed one; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="factor on the learning rates", ylabel="loss (running mean)", xscale="log")
    axes.plot(result.factors, result.losses)
    axes.axvline(result.best, color="0.5", linestyle="--", label=f"{result.best:.2g}x")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
