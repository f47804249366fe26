"""Training: transformers' `Trainer` with packed rows and logits only where a label is.

The third idea that makes training fast, the head computed once, is `SoftModel`'s own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DataCollatorWithFlattening

from softkv import checkpoint
from softkv.hf.model import SoftModel
from softkv.label_logits import label_logits


class PackingCollator(DataCollatorWithFlattening):
    """Puts rows end to end in one line, without padding: `input_ids`, `labels`, `position_ids` `[1, N]` and the
    cumulative lengths. Each row attends to the prefix and to itself."""

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True)


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for a `SoftModel`: everything of it, but

    - rows are packed, unless another `data_collator` is given (a padded batch gives the same loss);
    - logits are computed only where they predict a label (`label_logits_only=False` computes all of them);
    - checkpoints hold what is learned, not the base;
    - the learning curve is drawn to `learning_curve.png` in the output directory at the end.

    Args:
        model: a `SoftModel`.
        label_logits_only: whether to skip the logits that no label looks at.
        **kwargs: as in `transformers.Trainer`. A dataset's rows hold `input_ids` and `labels`, as `method.encode`
            gives them.
    """

    def __init__(self, model: SoftModel, *args: Any, label_logits_only: bool = True, **kwargs: Any) -> None:
        if not isinstance(model, SoftModel):
            raise TypeError(f"softkv.Trainer expects a SoftModel (softkv.attach), got {type(model).__name__}")
        if len(args) < 2:
            kwargs.setdefault("data_collator", PackingCollator())
        super().__init__(model, *args, **kwargs)
        self.label_logits_only = label_logits_only

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean cross-entropy over the batch's labels (over `num_items_in_batch` labels where given)."""
        all_logits = not self.label_logits_only or (return_outputs and not self.args.prediction_loss_only)
        if all_logits or self.compute_loss_func is not None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, targets = label_logits(model, inputs)
        total = F.cross_entropy(
            outputs.logits.float(), targets, reduction="sum", label_smoothing=self.args.label_smoothing_factor
        )
        loss = total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # processes are averaged afterwards
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; draws the learning curve afterwards."""
        result = super().train(*args, **kwargs)
        if self.is_world_process_zero():
            draw_learning_curve(self.state.log_history, Path(self.args.output_dir) / "learning_curve.png")
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        checkpoint.save(self.accelerator.unwrap_model(self.model), directory, folded=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _, tensors = checkpoint.read(Path(resume_from_checkpoint))
        checkpoint.put(self.accelerator.unwrap_model(model if model is not None else self.model).soft, tensors)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


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
