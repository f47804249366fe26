"""What watches a training run, and what ends one."""

from __future__ import annotations

import signal
import statistics
import threading
import warnings
from typing import Any

from torch.utils.data import IterableDataset
from transformers import ProgressCallback, TrainerCallback

from softkv.hf.attention_mass import mass_of_rows

# A loss that fell by less than this part in the whole run has not learned; noise of small batches may be as large.
FLAT = 0.02
LEAST_STEPS = 20  # to say so
ALL = 0.98  # of attention: more than a model's own first token takes


class NoLearningWarning(TrainerCallback):
    """Warns where nothing is learned: the gradients of the first step are all zero (some bases let none through,
    without a word), or the loss of the last quarter of a run is that of its first."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            return
        gradients = [each.grad for each in model.parameters() if each.requires_grad and each.grad is not None]
        if not any(bool(each.any()) for each in gradients):
            warnings.warn(
                "the gradients of the first step are all zero, so nothing is learned: the base lets none through (a "
                "quantised one may not), or no label depends on what is learned",
                stacklevel=2,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))  # type: ignore[index]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        quarter = len(self.losses) // 4
        if len(self.losses) < LEAST_STEPS:
            return
        first, last = statistics.fmean(self.losses[:quarter]), statistics.fmean(self.losses[-quarter:])
        if last > (1 - FLAT) * first:
            warnings.warn(
                f"the loss did not fall: {first:.4g} in the first quarter of the run, {last:.4g} in the last. Try "
                'another learning rate ("auto" is the method\'s own; softkv train --find-learning-rate looks for '
                "one), more steps, or another start (init)",
                stacklevel=2,
            )


class PrefixAttentionWarning(TrainerCallback):
    """Warns where a trained prefix takes nearly all attention, so that the model hardly sees its tokens."""

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        data = getattr(train_dataloader, "dataset", None)
        if args.world_size > 1 or isinstance(data, IterableDataset) or getattr(model, "answers", None) != "next token":
            return
        row = data[0] if data else None
        if not isinstance(row, dict) or not {"input_ids", "labels"} <= row.keys():
            return
        found = mass_of_rows(model, [row])
        mass = 0.0 if found is None else found.mean().item()
        if mass > ALL:
            warnings.warn(
                f"{mass:.0%} of attention goes to the prefix, so the model hardly sees its tokens: try a lower "
                "learning rate, fewer slots, or another start (init); softkv inspect --on shows each layer",
                stacklevel=2,
            )


class StopOnSignal(TrainerCallback):
    """Ends training after the step under way, with a checkpoint, when Ctrl-C is pressed or the process is asked to
    end. A second time, it ends at once. What was ignored (Ctrl-C, in a shell's background job) stays ignored."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._stop)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop(self, *arguments: Any) -> None:
        self.stopped = True
        self.release()  # a second time is not ours


class ProgressBar(ProgressCallback):
    """transformers' progress bar with the last losses at its end, in place of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = {name: logs[name] for name in ("loss", "eval_loss") if name in (logs or {})}  # type: ignore[index]
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
