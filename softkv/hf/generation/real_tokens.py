"""What logits processors and stopping criteria are shown of the prompts that the base generates from: the real tokens
alone, without the columns of soft tokens.

transformers makes its own processors and criteria inside `generate`, from options that count columns. Two methods of
the base make them; a base that a SoftModel generates with has its own versions of the two, which ask here for the
`generate` under way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from softkv.hf.layout import left_padded


@dataclass(frozen=True)
class RealTokens:
    """
    Attributes:
        prompts: `[B, T]`, the real tokens of each prompt, left-padded.
        mask: `[B, T]`, the padding mask of them.
        hidden: by how many columns the base's prompts are wider.
    """

    prompts: Tensor
    mask: Tensor
    hidden: int

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, soft_at: Tensor, pad: int) -> RealTokens:
        """Those of prompts `[B, T + hidden]` with soft tokens where `soft_at` is not -1."""
        real = soft_at < 0
        if mask is not None:
            real &= mask.bool()
        hidden = int((soft_at >= 0).sum(1).min())
        prompts = left_padded(ids.masked_fill(~real, pad), real)[:, hidden:]
        return cls(prompts, left_padded(real.long(), real)[:, hidden:], hidden)

    def __call__(self, ids: Tensor) -> Tensor:
        """`[R, S]` of the base's ids `[R, S + hidden]`; the rows of one prompt follow each other."""
        prompts = self.prompts.repeat_interleave(len(ids) // len(self.prompts), 0)
        return torch.cat([prompts, ids[:, prompts.shape[1] + self.hidden :]], 1)

    def lengths(self, config: Any) -> Any:
        """A generation config with total lengths that count the columns shown."""
        config = copy.copy(config)
        for name in ("max_length", "min_length"):
            length = getattr(config, name)
            if length:
                setattr(config, name, length - self.hidden)
        return config


class _Processors(LogitsProcessorList):
    def __init__(self, processors: Any, shown: RealTokens) -> None:
        super().__init__(processors)
        self.shown = shown

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(self.shown(input_ids), scores, **kwargs)


class _Criteria(StoppingCriteriaList):
    def __init__(self, criteria: Any, shown: RealTokens) -> None:
        super().__init__(criteria)
        self.shown = shown

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(self.shown(input_ids), scores, **kwargs)

    @property
    def max_length(self) -> int | None:
        """In columns of the base."""
        longest = super().max_length
        return longest if longest is None else longest + self.shown.hidden


@dataclass(frozen=True)
class _UnderWay:
    model: Any
    shown: RealTokens | None


_under_way: ContextVar[_UnderWay | None] = ContextVar("softkv_generate", default=None)


@contextmanager
def generating(model: Any, shown: RealTokens | None) -> Iterator[None]:
    """A `generate` of a SoftModel: gives its base own versions of the two methods, which stay until `uninstall`."""
    for name, method in _METHODS.items():
        setattr(model.base, name, MethodType(method, model.base))
    token = _under_way.set(_UnderWay(model, shown))
    try:
        yield
    finally:
        _under_way.reset(token)


def uninstall(base: Any) -> None:
    """Leaves the base with its class's methods."""
    for name in _METHODS:
        base.__dict__.pop(name, None)


def _get_logits_processor(base: Any, **options: Any) -> LogitsProcessorList:
    call = _under_way.get()
    shown = None if call is None else call.shown
    if shown is not None:
        options |= _options_shown(shown, options)
    processors = type(base)._get_logits_processor(base, **options)
    if call is not None:
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is base:
                processor.model = _of_prompts(call.model)
    return processors if shown is None else _Processors(processors, shown)


def _options_shown(shown: RealTokens, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `_get_logits_processor` in columns shown."""
    config = options["generation_config"]
    prompts, rows = options["encoder_input_ids"], max(config.num_beams or 1, config.num_return_sequences or 1)
    mask = None if bool(shown.mask.all()) else shown.mask.repeat_interleave(rows, 0)
    return {
        "generation_config": shown.lengths(config),
        "input_ids_seq_length": options["input_ids_seq_length"] - shown.hidden,
        "encoder_input_ids": shown(prompts) if prompts.dim() == 2 else prompts,
        "model_kwargs": options["model_kwargs"] | {"attention_mask": mask},
    }


def _get_stopping_criteria(base: Any, **options: Any) -> StoppingCriteriaList:
    call = _under_way.get()
    if call is None or call.shown is None:
        return type(base)._get_stopping_criteria(base, **options)
    options["generation_config"] = call.shown.lengths(options["generation_config"])
    return _Criteria(type(base)._get_stopping_criteria(base, **options), call.shown)


def _of_prompts(model: Any) -> Callable[..., Any]:
    """Forwards of the unconditional prompts of classifier-free guidance, under the soft prompt: the first tokens given
    are the prompts."""
    lengths: Tensor | None = None

    def forward(ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        nonlocal lengths
        lengths = attention_mask.sum(1) if lengths is None else lengths
        return model(ids, attention_mask=attention_mask, prompt_lengths=lengths, **options)

    return forward


# Under the names that they take the place of, so that models can be pickled.
_METHODS = {method.__name__: method for method in (_get_logits_processor, _get_stopping_criteria)}
