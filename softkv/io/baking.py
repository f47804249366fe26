"""Baking: convert what precedes every input to a P-tuning v2 prefix with the same logits.

In a causal decoder, leading tokens do not depend on what follows, so they run once and their K/V are kept. Soft tokens,
texts and documents are then served like any shared prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from softkv.evaluation import in_evaluation
from softkv.hf.task_heads import modules_of
from softkv.io.attach import assemble
from softkv.io.config import MODULES
from softkv.io.soft_model import SoftModel
from softkv.methods import PromptTuning, PTuning, PTuningV2, Template
from softkv.methods.base import matrices_by_name
from softkv.methods.template import Answer, Field
from softkv.prefix import Prefix


@torch.no_grad()
def bake(
    model: Any,
    *,
    text: str | Sequence[int] | None = None,
    tokenizer: Any = None,
    template: str = "[X] [Y]",
    backend: str | None = None,
) -> SoftModel:
    """Convert what precedes every input to a `PTuningV2` prefix that gives the same logits.

    Args:
        model: a `SoftModel` whose soft tokens come first: `PromptTuning(position="before")`, or `PTuning` with a
            template that begins with them, possibly with text between them. With `text`, a transformers causal LM.
        text: the text to bake instead of soft tokens, such as a system prompt or a document, or its token ids. A text
            is tokenised with the tokenizer's leading special tokens (a BOS if it adds one).
        tokenizer: the model's tokenizer, needed for a text and for `PTuning`.
        template: with `text`: how `encode` builds the rows that follow it.
        backend: as in `softkv.prefix_attention`; None chooses by device.

    Returns:
        A `SoftModel` in evaluation mode on the same base; `model` is unchanged. Rows of `PromptTuning` stay the same.
        Rows of `PTuning` or of a text are the rest of the template, without a BOS, as built by the method's `encode`.

    Raises:
        ValueError: if not all soft tokens come before everything that differs between rows, or there is nothing to
            bake.
        TypeError: if both a text and a soft prompt are given, or neither.

    Example:
        >>> model = softkv.attach(base, softkv.PromptTuning(length=2, position="before"))
        >>> softkv.bake(model).method.length
        2
        >>> softkv.bake(base, text="w5 w6", tokenizer=tokenizer).method.length  # a BOS and two words
        3
    """
    if isinstance(model, SoftModel) == (text is not None):
        raise TypeError("softkv.bake expects a SoftModel with soft tokens, or a transformers model and a text")
    base = model.base if isinstance(model, SoftModel) else model
    if isinstance(model, SoftModel) and not model.is_causal:
        raise ValueError(
            f"softkv.bake expects a causal decoder: in the bidirectional {type(base).__name__}, what comes first "
            "depends on what follows"
        )
    if text is not None:
        ids = _text_ids(tokenizer, text)
        embeds, continues = _embeddings(base, torch.tensor(ids), None), True
    elif isinstance(model.method, PTuning):
        ids, template = _constant_head(model.method, tokenizer)
        embeds, continues = _embeddings(base, torch.tensor(ids), _soft_tokens(model)), True
    elif isinstance(model.method, PromptTuning) and model.method.position == "before":
        embeds, continues, template = _soft_tokens(model), False, model.method.template
    else:
        raise ValueError(
            f"softkv.bake expects soft tokens that stand before the input, got {model.method}: it takes "
            'PromptTuning(position="before"), PTuning with a template that begins with its soft tokens, and texts'
        )
    prefix = Prefix.from_embeddings(base, embeds[None].to(base.device, base.dtype))
    method = PTuningV2(length=prefix.length, window_covers=True, continues=continues, template=template)
    config: dict[str, Any] = {"method": "p-tuning-v2", "config": asdict(method), "folded": True, "base": {}}
    tensors = matrices_by_name(prefix.k, prefix.v)
    if isinstance(model, SoftModel) and (saved := modules_of(model, model.active_adapter)) is not None:
        config[MODULES] = list(saved.paths)
        tensors |= {f"{MODULES}.{name}": tensor for name, tensor in saved.tensors().items()}
    return assemble(base, config, tensors, backend=backend)


def _soft_tokens(model: SoftModel) -> Tensor:
    tokens = in_evaluation(model.soft).soft_tokens()
    assert tokens is not None
    return tokens


def _embeddings(base: Any, ids: Tensor, soft_tokens: Tensor | None) -> Tensor:
    """Input embeddings `[P, C]` of ids, with soft token -i-1 where an id i is negative."""
    embeds = base.get_input_embeddings()(ids.clamp(min=0).to(base.device))
    if soft_tokens is None:
        return embeds
    soft = soft_tokens.to(embeds)[(-ids - 1).clamp(min=0).to(base.device)]
    return torch.where((ids < 0)[:, None].to(base.device), soft, embeds)


def _text_ids(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("softkv.bake needs the tokenizer of a text: bake(model, text=..., tokenizer=tokenizer)")
        ids = tokenizer(text)["input_ids"]
    else:
        ids = list(text)
    if not ids or not text:  # a BOS alone is not a text
        raise ValueError(f"softkv.bake expects a text of at least one token, got {text!r}")
    return ids


def _constant_head(method: PTuning, tokenizer: Any) -> tuple[list[int], str]:
    """The ids of a template up to its first field, and the template of the rest."""
    pieces = Template.parse(method.template).pieces
    at = next(at for at, piece in enumerate(pieces) if isinstance(piece, Field | Answer))
    head, rest = Template((*pieces[:at], Answer())), Template(pieces[at:])
    spaced = at > 0 and str(pieces[at - 1]).endswith(" ")
    if rest.soft_tokens:
        raise ValueError(
            f"softkv.bake expects all soft tokens before the first field, got the template {method.template!r}: what "
            "follows a field depends on the row"
        )
    if tokenizer is None:
        raise ValueError("softkv.bake needs the tokenizer of a template: bake(model, tokenizer=tokenizer)")
    return head.encode(tokenizer)["input_ids"], (" " if spaced else "") + str(rest)
