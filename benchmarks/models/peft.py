"""PEFT's methods on the same models, compared with the same runs of the bare model: "ok", "wrong: …" or "error: …"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softkv.methods.base import SoftPrompt
from softkv.prefix import Prefix

from .causal import generated
from .methods import Subject
from .rows import Row, padded, rows
from .verdicts import direction, outcome, verdict

SLOTS = 5
CONFIGS = {"prefix": "PrefixTuningConfig", "prompt": "PromptTuningConfig", "P-tuning": "PromptEncoderConfig"}


class Learned(SoftPrompt):
    """What PEFT has learned, as a run of the bare model takes it: soft tokens before the row, or a prefix."""

    placement = "before"

    def __init__(self, model: Any, is_prefix: bool, shape: tuple[int, int]) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.is_prefix, self.kv_shape = model, is_prefix, shape

    def _values(self) -> Tensor:
        """`[P, C]`, or `[P, L·2·G·D]`: K of a layer stands before its V."""
        encoder = self.model.prompt_encoder["default"]
        return encoder(self.model.prompt_tokens["default"][None])[0]

    def soft_tokens(self) -> Tensor | None:
        return None if self.is_prefix else self._values()

    def prefix(self) -> Prefix | None:
        if not self.is_prefix:
            return None
        k, v = self._values().unflatten(1, (-1, 2, *self.kv_shape)).permute(2, 1, 3, 0, 4)[:, :, None]
        return Prefix(k, v)


def check(subject: Subject, bare: Any, build: Callable[[], Any], task: str) -> dict[str, dict[str, str]]:
    return {kind: _check(subject, bare, build, kind, task) for kind in CONFIGS}


def _check(subject: Subject, bare: Any, build: Callable[[], Any], kind: str, task: str) -> dict[str, str]:
    import peft

    from .entries import TASKS

    torch.manual_seed(1)
    config = getattr(peft, CONFIGS[kind])(task_type=TASKS[task].peft, num_virtual_tokens=SLOTS)
    try:
        model = peft.get_peft_model(build(), config).eval()
        shape = (config.num_attention_heads, config.token_dim // config.num_attention_heads)
    except Exception as error:
        return {"get_peft_model": _error(error)}
    learned = Learned(model, kind == "prefix", shape)
    parameters = list(model.prompt_encoder.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    given = rows(inline=False)
    forward = partial(_forward, subject, bare, model, learned, parameters)
    trials: dict[str, Callable[[], str]] = {
        "row alone": lambda: forward(given[:1]),
        "padded right": lambda: forward(given),
    }
    if task == "causal":
        trials["generate"] = lambda: generated(bare, model, learned, given[:1])
        trials["generate, padded left"] = lambda: generated(bare, model, learned, given)
    return {name: _said(trial) for name, trial in trials.items()}


def _forward(
    subject: Subject, bare: Any, model: Any, learned: Learned, parameters: list[Tensor], given: list[Row]
) -> str:
    """Answers, and gradients of what is learned."""
    try:
        wanted = [subject.alone(bare, learned, row) for row in given]
    except Exception as error:
        return f"base: {_error(error)}"
    batch, _ = padded(given, "right")
    answers = subject.answers(model(**batch))
    width = batch["input_ids"].shape[1]
    got = [
        one if len(one) == len(want) and one.dim() < 2 else one[-width:][: len(want)]  # soft tokens are answered too
        for one, want in zip(answers, wanted, strict=True)
    ]
    said = verdict([one.detach() for one in got], [one.detach() for one in wanted])
    if said != "ok":
        return said
    losses = [torch.stack([(one * direction(one)).sum() for one in each]).sum() for each in (got, wanted)]
    wishes = [torch.autograd.grad(loss, parameters) for loss in losses]
    return verdict(list(wishes[0]), list(wishes[1]))


def _said(trial: Callable[[], str]) -> str:
    said = outcome(trial)
    for kind in ("crash: ", "refused: "):
        if said.startswith(kind):
            return f"error: {said.removeprefix(kind)}"
    return said


def _error(error: Exception) -> str:
    return f"error: {type(error).__name__}: {' '.join(str(error).split())}"[:200]
