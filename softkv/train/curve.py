"""The picture of a run: its losses over its steps."""

from __future__ import annotations

import os


def draw_learning_curve(log_history: list[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Draws the losses of a `Trainer`'s log over its steps; draws nothing where there are none."""
    from matplotlib.figure import Figure

    curves = {
        name: [(entry["step"], entry[key]) for entry in log_history if key in entry]
        for name, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    if not any(curves.values()):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a label)")
    for name, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=name, marker="." if len(points) < 50 else "")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
