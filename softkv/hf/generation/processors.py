"""Logits processors, stopping criteria and streamers of a `generate`. They see real tokens only, without the columns of
soft tokens, and run outside the call's scope, so that models called by them behave as usual.

transformers creates its own processors and criteria inside `generate`, from options that count columns, in two methods
of the base. While a SoftModel generates, the base has its own versions of the two, which look up the running
`generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from softkv.hf import call_scope
from softkv.hf.generation.cache_state import past_length
from softkv.hf.layout import left_padded


@dataclass(frozen=True)
class ProcessorView:
    """The rows of a `generate` as processors and criteria see them.

    Attributes:
        prompts: `[B, T]`, the real tokens of each prompt, left-padded.
        mask: `[B, T]`, their padding mask.
        hidden: the number of additional columns in the base's prompts.
    """

    prompts: Tensor
    mask: Tensor
    hidden: int

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, soft_at: Tensor, pad: int) -> ProcessorView:
        """From prompts `[B, T + hidden]` with soft tokens where `soft_at` is not -1."""
        real = soft_at < 0
        if mask is not None:
            real &= mask.bool()
        hidden = int((soft_at >= 0).sum(1).min())
        prompts = left_padded(ids.masked_fill(~real, pad), real)[:, hidden:]
        return cls(prompts, left_padded(real.long(), real)[:, hidden:], hidden)

    def __call__(self, ids: Tensor) -> Tensor:
        """`[R, S]` from the base's ids `[R, S + hidden]`; the rows of one prompt are adjacent."""
        prompts = self.prompts.repeat_interleave(len(ids) // len(self.prompts), 0)
        return torch.cat([prompts, ids[:, prompts.shape[1] + self.hidden :]], 1)

    def lengths(self, config: Any) -> Any:
        """A generation config with total lengths in visible columns."""
        config = copy.copy(config)
        for name in ("max_length", "min_length"):
            length = getattr(config, name)
            if length:
                setattr(config, name, length - self.hidden)
        return config


class _Processors(LogitsProcessorList):
    def __init__(self, processors: Any, view: ProcessorView | None) -> None:
        super().__init__(processors)
        self.view = view

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ids = input_ids if self.view is None else self.view(input_ids)
        return call_scope.run(None, super().__call__, ids, scores, **kwargs)


class _Criteria(StoppingCriteriaList):
    def __init__(self, criteria: Any, view: ProcessorView | None) -> None:
        super().__init__(criteria)
        self.view = view

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ids = input_ids if self.view is None else self.view(input_ids)
        return call_scope.run(None, super().__call__, ids, scores, **kwargs)

    @property
    def max_length(self) -> int | None:
        """The maximum length in columns of the base."""
        longest = super().max_length
        return longest if longest is None or self.view is None else longest + self.view.hidden


class Streamer:
    """A user's streamer.

    Args:
        streamer: the user's.
        prompts: `[B, T]`, passed to it instead of the base's prompts; None: the base's.
    """

    def __init__(self, streamer: Any, prompts: Tensor | None) -> None:
        self.streamer, self.prompts = streamer, prompts

    def put(self, value: Tensor) -> None:
        if self.prompts is not None:
            value, self.prompts = self.prompts.cpu(), None
        call_scope.run(None, self.streamer.put, value)

    def end(self) -> None:
        call_scope.run(None, self.streamer.end)


def install(base: Any) -> None:
    """Install the two methods on a base, until `uninstall`."""
    for name, method in _METHODS.items():
        if name not in base.__dict__:
            setattr(base, name, MethodType(method, base))


def uninstall(base: Any) -> None:
    """Restore the methods of the base's class."""
    for name in _METHODS:
        base.__dict__.pop(name, None)


def _call_of(base: Any) -> Any:
    call = call_scope.current()
    return call if call is not None and call.hooks.base is base and call.prompts is not None else None


def _get_logits_processor(base: Any, **options: Any) -> LogitsProcessorList:
    call = _call_of(base)
    if call is None:
        return type(base)._get_logits_processor(base, **options)
    view = call.prompts.view
    if view is not None:
        options |= _options_in(view, options)
    processors = type(base)._get_logits_processor(base, **options)
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is base:
            processor.model = _of_prompts(call.model)
    return _Processors(processors, view)


def _options_in(view: ProcessorView, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `_get_logits_processor` in columns of a view."""
    config = options["generation_config"]
    prompts, rows = options["encoder_input_ids"], max(config.num_beams or 1, config.num_return_sequences or 1)
    mask = None if bool(view.mask.all()) else view.mask.repeat_interleave(rows, 0)
    return {
        "generation_config": view.lengths(config),
        "input_ids_seq_length": options["input_ids_seq_length"] - view.hidden,
        "encoder_input_ids": view(prompts) if prompts.dim() == 2 else prompts,
        "model_kwargs": options["model_kwargs"] | {"attention_mask": mask},
    }


def _get_stopping_criteria(base: Any, **options: Any) -> StoppingCriteriaList:
    call = _call_of(base)
    if call is None:
        return type(base)._get_stopping_criteria(base, **options)
    view = call.prompts.view
    if view is not None:
        options["generation_config"] = view.lengths(options["generation_config"])
    return _Criteria(type(base)._get_stopping_criteria(base, **options), view)


def _of_prompts(model: Any) -> Callable[..., Any]:
    """Runs the unconditional prompts of classifier-free guidance with the soft prompt: the first tokens are the
    prompts."""
    lengths: Tensor | None = None

    def forward(ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        nonlocal lengths
        lengths = attention_mask.sum(1) if lengths is None else lengths
        ends = {} if past_length(options.get("past_key_values")) else {"prompt_lengths": lengths}
        return model(ids, attention_mask=attention_mask, **ends, **options)

    return forward


# Under the names that they replace, so that models can be pickled.
_METHODS = {method.__name__: method for method in (_get_logits_processor, _get_stopping_criteria)}
