"""The checks of one method on one model, for any kind of output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import softkv
from softkv.methods.base import Method, SoftPrompt

from .rows import Batch, Row, rows
from .verdicts import direction, failure, far, outcome, sentence, verdict

METHODS: dict[str, Method] = {
    "P-tuning v2": softkv.PTuningV2(length=5),
    "Prefix-tuning": softkv.PrefixTuning(length=5),
    "Prompt-tuning, after": softkv.PromptTuning(length=3),
    "Prompt-tuning, before": softkv.PromptTuning(length=3, position="before"),
    "P-tuning": softkv.PTuning(template="[P1] [X] [P2] [Y]", encoder_size=8),
}
Trials = dict[str, Callable[[], str]]
_PADDED = ("padded right", "padded left", "gradients")


class Subject:
    """Models that answer alike. What is said of a method starts with "ok", "refused: …" (a sentence of softkv's),
    "base: …" (the bare model can't either), "wrong: …" or "crash: …"."""

    def rows(self, bare: Any, inline: bool) -> list[Row]:
        """The rows that are given, with soft tokens at negative ids if `inline`."""
        return rows(inline)

    def bare(self, model: Any, ids: Tensor) -> Tensor:
        """The answer of a bare model to a row `[1, T]`."""
        raise NotImplementedError

    def learned(self, soft: Any) -> SoftPrompt:
        """What has been learned, as `alone` takes it."""
        return soft.soft

    def alone(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        """The answer to one row, in which nothing is ours."""
        raise NotImplementedError

    def batch(self, given: list[Row], side: str) -> Batch:
        """A padded batch, and how its answers are those of rows."""
        raise NotImplementedError

    def answers(self, output: Any) -> Tensor:
        """What a model's output answers to a batch."""
        raise NotImplementedError

    def base_pads(self, bare: Any) -> bool:
        """Whether padding behind rows changes nothing in the bare model, as far as can be told."""
        return True

    def trials(self, bare: Any, soft: Any, given: list[Row], wanted: list[Tensor]) -> Trials:
        """What is tried beside."""
        return {}

    # What is tried on all of them -------------------------------------------------------------------------------------

    def check_method(self, bare: Any, model: Any, method: Method) -> dict[str, str]:
        """The outcome of every check of a method."""
        state = self._state(model)
        torch.manual_seed(1)
        try:
            soft = softkv.attach(model, method).eval()
        except Exception as error:
            said = failure(error)
            if self._state(model) != state:
                said = f"wrong: a failed attach changed the base; {said}"
            return {"attach": said}
        done = {"attach": "ok"}
        with torch.no_grad():
            for parameter in soft.soft.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        try:
            given = self.rows(bare, soft.soft.placement == "inline")
            learned = self.learned(soft)
            found = [self.alone(bare, learned, row) for row in given]
            loss = torch.stack([(one * direction(one)).sum() for one in found]).sum()
            gradients = torch.autograd.grad(loss, list(soft.soft.parameters()))
        except Exception as error:
            soft.detach()
            return done | {"truth": f"base: {sentence(error)}"}
        wanted = [one.detach() for one in found]
        with torch.no_grad():
            if not far(wanted[0], self.bare(bare, torch.tensor([given[0].ids]).clamp(min=0))):
                done["effect"] = "base: the prompt changes nothing"
        forward = partial(self.forward, soft, wanted)
        trials: Trials = {
            "rows alone": lambda: forward([self.batch([row], "right") for row in given]),
            "padded right": lambda: forward([self.batch(given, "right")]),
            "padded left": lambda: forward([self.batch(given, "left")]),
            "gradients": lambda: self._gradients(soft, given, list(gradients)),
            **self.trials(bare, soft, given, wanted),
            "disabled": lambda: self._disabled(bare, soft),
            "save and load": lambda: self._reload(soft, given),  # it ends the soft prompt
        }
        done |= {check: outcome(trial) for check, trial in trials.items()}
        moved = [check for check in _PADDED if done[check].startswith("wrong")]
        if moved and not self.base_pads(bare):
            done |= dict.fromkeys(moved, "base: its own answers are others behind and before padding")
        soft.detach()
        done["detach"] = "ok" if self._state(model) == state else "wrong: the base is not as it was"
        return done

    @torch.no_grad()
    def forward(self, soft: Any, wanted: list[Tensor], batches: list[Batch]) -> str:
        """Whether batches are answered as rows are."""
        got = [one for batch, split in batches for one in split(self.answers(soft(**batch)))]
        if wanted[0].dim() == 1:  # a few numbers a row: rows tell how much they vary
            return verdict([torch.stack(got)], [torch.stack(wanted)])
        return verdict(got, wanted)

    def _gradients(self, soft: Any, given: list[Row], wanted: list[Tensor]) -> str:
        batch, split = self.batch(given, "right")
        loss = torch.stack([(one * direction(one)).sum() for one in split(self.answers(soft(**batch)))]).sum()
        return verdict(list(torch.autograd.grad(loss, list(soft.soft.parameters()))), wanted)

    @torch.no_grad()
    def _reload(self, soft: Any, given: list[Row]) -> str:
        batch, _ = self.batch(given, "right")
        wanted = self.answers(soft(**batch))
        with tempfile.TemporaryDirectory() as folder:
            soft.save_pretrained(folder)
            again = softkv.load(soft.detach(), folder)
        got = self.answers(again(**batch))
        again.detach()
        return verdict([got], [wanted])

    @torch.no_grad()
    def _disabled(self, bare: Any, soft: Any) -> str:
        ids = torch.arange(5, 12)[None]
        with soft.disabled():
            return verdict([self.bare(soft, ids)], [self.bare(bare, ids)])

    @torch.no_grad()
    def _state(self, model: Any) -> tuple[Any, ...]:
        answer = self.bare(model, torch.arange(5, 10)[None])
        flags = tuple(parameter.requires_grad for parameter in model.parameters())
        modes = tuple(module.training for module in model.modules())
        return answer.sum().item(), answer.abs().sum().item(), flags, modes, model.config._attn_implementation
