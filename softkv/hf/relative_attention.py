"""Prefixes on encoders whose scores have relative positions of their own (DeBERTa, MPNet): their attention modules keep
their projections and biases, and the prefix is an operand of its own beside them.

Slots join the softmax without terms of position, scaled as the products of tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softkv.hf import call_scope, checkpointing
from softkv.hf.context import BlockInputs, SoftContext
from softkv.hf.dense import masked_attention


@dataclass(frozen=True)
class BlockOperands:
    """Attention of one block.

    Attributes:
        query, key, value: `[B, H, T, D]`.
        allowed: bool or added to the scores, `[B, 1, 1 or T, T]`.
        bias: added to the scores, `[B or 1, H, T, T]`, or None.
        scale: of the products of queries and keys.
        leave: from what is attended, `[B, T, H·D]`, to the module's output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor
    bias: Tensor | None
    scale: float
    leave: Callable[[Tensor], tuple[Any, ...]]


def _of_deberta(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> BlockOperands:
    """Disentangled attention: products of contents, of contents and positions, and of positions and contents, which
    share one scale."""
    asking, H = hidden_states if query_states is None else query_states, module.num_attention_heads
    query, key, value = (
        projection(states).unflatten(2, (H, -1)).transpose(1, 2)
        for projection, states in (
            (module.query_proj, asking),
            (module.key_proj, hidden_states),
            (module.value_proj, hidden_states),
        )
    )
    terms, bias = 1 + len({"c2p", "p2c"}.intersection(module.pos_att_type)), None
    if module.relative_attention:
        contents = query.flatten(0, 1), key.flatten(0, 1)
        bias = module.disentangled_attention_bias(*contents, relative_pos, module.pos_dropout(rel_embeddings), terms)
        bias = bias.unflatten(0, (-1, H)) if isinstance(bias, Tensor) else None
    scale = (query.shape[-1] * terms) ** -0.5
    return BlockOperands(query, key, value, attention_mask.bool(), bias, scale, lambda out: (out, None))


def _of_mpnet(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> BlockOperands:
    """Biases by relative position, which all blocks share."""
    query, key, value = (
        projection(hidden_states).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2)
        for projection in (module.q, module.k, module.v)
    )
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    scale = query.shape[-1] ** -0.5
    return BlockOperands(query, key, value, attention_mask, position_bias, scale, lambda out: (module.o(out),))


# By the names of their attention modules.
_READERS: dict[str, Callable[..., BlockOperands]] = {
    "DisentangledSelfAttention": _of_deberta,
    "MPNetSelfAttention": _of_mpnet,
}


@dataclass(frozen=True)
class InScores:
    """Gives the attention modules of an encoder prefixes.

    Attributes:
        modules: its attention modules.
    """

    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, decoder: nn.Module) -> InScores | None:
        """None where its attention is not known, or others have put their own on it."""
        modules = tuple(module for module in decoder.modules() if type(module).__name__ in _READERS)
        foreign = any(getattr(vars(each).get("forward"), "func", _attend) is not _attend for each in modules)
        return cls(modules) if modules and not foreign else None

    def register(self, hooks: Any) -> None:
        """Has the modules serve calls of a soft model, beside those of others."""
        for number, module in enumerate(self.modules):
            forward = vars(module).get("forward")
            if forward is None:
                forward = module.forward = partial(_attend, module, number, [])
            forward.args[2].append(hooks)

    def remove(self, hooks: Any) -> None:
        """Ends `register`. May be repeated."""
        for module in self.modules:
            forward = vars(module).get("forward")
            if forward is None:
                continue
            forward.args[2][:] = [each for each in forward.args[2] if each is not hooks]
            if not forward.args[2]:
                del module.forward

    def enter(self, decoder: Any, context: SoftContext, kwargs: dict[str, Any]) -> None:
        """Looks at a forward of the encoder that a prefix goes with."""
        if context.layers is not None and decoder.training and checkpointing.is_on(decoder):
            raise ValueError(
                f"{type(decoder).__name__} keeps its own attention, to which no prefix comes in a recomputed pass: "
                "gradient_checkpointing_disable() it"
            )


def _attend(module: Any, number: int, served: list[Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The forward of an attention module: its own, but in calls whose rows have prefixes."""
    call = call_scope.current()
    context = call.context if call is not None and any(call.hooks is each for each in served) else None
    if context is None or (context.layers is None and context.capture is None):
        return type(module).forward(module, *args, **kwargs)
    this = _READERS[type(module).__name__](module, *args, **kwargs)
    query, key, value = this.query, this.key, this.value
    if context.capture is not None:
        context.capture.append(BlockInputs(module, key, value, None, False))
    prefix = context.of_layer(number, len(query), query.dtype, query.device)
    out = masked_attention(
        query, key, value, this.allowed, this.bias, prefix, scale=this.scale, softcap=None, sinks=None,
        backend=context.backend,
    )  # fmt: skip
    return this.leave(out.transpose(1, 2).flatten(2))
