"""Bases whose attention softkv can't replace. They support soft tokens inside rows, and prefixes if there is a carrier
(`softkv.hf.past`, `softkv.hf.relative_attention`). Their properties are measured by running a few tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.evaluation import in_evaluation
from softkv.hf import call_scope
from softkv.hf.behaviour import TOKENS, nearly_embedded, same
from softkv.hf.frozen import UnsupportedAttention
from softkv.hf.layout import token_positions
from softkv.hf.past import InPast
from softkv.hf.relative_attention import InScores


@dataclass(frozen=True)
class OwnAttention:
    """The properties of a base that keeps its own attention.

    Attributes:
        reason: why softkv can't replace its attention.
        takes_positions: whether the decoder takes position ids.
        causal: whether tokens see only earlier ones.
        embeds: whether embeddings represent tokens completely.
        carrier: brings prefixes to its attention; None if it supports none.
        widths: (G, D, Dv) of each attention block, if there is a carrier.
    """

    reason: str
    takes_positions: bool
    causal: bool = True
    embeds: bool = True
    carrier: InPast | InScores | None = None
    widths: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, decoder: nn.Module, base: Any, ids: Tensor, reason: str) -> OwnAttention | None:
        """Measure with a few tokens `ids` `[1, T]`. None if the decoder does not use a standard cache, or treats
        padding in front of a row as tokens: soft tokens would give wrong results there.

        Args:
            base: the model that contains the decoder.

        Raises:
            UnsupportedAttention: if no token sees others.
        """
        parameters = inspect.signature(decoder.forward).parameters
        needed = {"inputs_embeds", "attention_mask"} | ({"past_key_values"} if base.can_generate() else set())
        if not needed <= parameters.keys():
            return None
        found = cls(reason, "position_ids" in parameters)
        if ids.device.type == "meta":
            return found
        run = _Run(in_evaluation(decoder), found.takes_positions)
        row, half = run(torch.ones_like(ids), input_ids=ids), TOKENS // 2
        if row is None:
            return None
        embeds = nearly_embedded(base, ids, row.dtype)
        by_embeds = None if embeds is None else run(torch.ones_like(ids), inputs_embeds=embeds)
        behind = run(F.pad(torch.ones_like(ids), (half, 0)), input_ids=F.pad(ids, (half, 0)))
        # A row's first token sees only itself, at any position.
        if behind is None or not same(behind[0, -half:], row[0, -half:]):
            return None
        others = run(torch.ones_like(ids), input_ids=torch.cat([ids[:, :half].flip(1), ids[:, half:]], 1))
        if ids.unique().numel() == TOKENS and others is not None and torch.equal(others[0, half:], row[0, half:]):
            raise UnsupportedAttention(
                f"softkv.attach expects a model whose tokens see earlier ones, got {type(base).__name__}: soft tokens "
                "would have no effect"
            )
        first = run(torch.ones_like(ids[:, :half]), input_ids=ids[:, :half])
        return replace(
            found,
            causal=first is not None and same(first[0], row[0, :half]),
            embeds=by_embeds is not None and same(by_embeds[0], row[0]),
        )


@dataclass(frozen=True)
class _Run:
    decoder: nn.Module
    takes_positions: bool

    @torch.no_grad()
    def __call__(self, mask: Tensor, **tokens: Tensor) -> Tensor | None:
        """Hidden states `[1, T, C]`, or None if the decoder doesn't support these inputs."""
        inputs: dict[str, Any] = {**tokens, "attention_mask": mask, "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = token_positions(mask, (mask.shape[0], mask.shape[1]), 0, mask.device)
        try:
            output = call_scope.run(None, self.decoder, **inputs)
        except Exception:
            return None
        return output if isinstance(output, Tensor) else output[0]
