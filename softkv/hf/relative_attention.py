"""Prefixes on encoders with relative positions in their scores (DeBERTa, MPNet). Their attention modules keep their
projections and position terms; softkv computes the softmax, with the prefix as a separate operand.

Scores of slots have no position terms and the same scale as the content scores of tokens.
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
    """The operands of one block's attention.

    Attributes:
        query, key, value: `[B, H, T, D]`.
        allowed: `[B, 1, 1 or T, T]`, bool, or additive on the scores.
        bias: added to the scores, `[B or 1, H, T, T]`, or None.
        scale: multiplies the products of queries and keys.
        output: returns the module's output, given the result of attention, `[B, T, H·D]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor
    bias: Tensor | None
    scale: float
    output: Callable[[Tensor], tuple[Any, ...]]


def _of_deberta(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> BlockOperands:
    """Disentangled attention: content-to-content, content-to-position and position-to-content scores with one scale."""
    query_input, H = hidden_states if query_states is None else query_states, module.num_attention_heads
    query, key, value = (
        projection(states).unflatten(2, (H, -1)).transpose(1, 2)
        for projection, states in (
            (module.query_proj, query_input),
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
    """Attention with a relative position bias shared by all blocks."""
    query, key, value = (
        projection(hidden_states).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2)
        for projection in (module.q, module.k, module.v)
    )
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    scale = query.shape[-1] ** -0.5
    return BlockOperands(query, key, value, attention_mask, position_bias, scale, lambda out: (module.o(out),))


# By the class name of the attention module.
_READERS: dict[str, Callable[..., BlockOperands]] = {
    "DisentangledSelfAttention": _of_deberta,
    "MPNetSelfAttention": _of_mpnet,
}


@dataclass(frozen=True)
class InScores:
    """Adds prefixes to the scores of an encoder's attention modules.

    Attributes:
        modules: the attention modules.
    """

    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, decoder: nn.Module) -> InScores | None:
        """None if the attention modules are unknown, or another library has replaced their `forward`."""
        modules = tuple(module for module in decoder.modules() if type(module).__name__ in _READERS)
        foreign = any(getattr(vars(each).get("forward"), "func", _attend) is not _attend for each in modules)
        return cls(modules) if modules and not foreign else None

    def register(self, hooks: Any) -> None:
        """Replace the `forward` of the modules for calls of one SoftModel, in addition to those registered before."""
        for number, module in enumerate(self.modules):
            forward = vars(module).get("forward")
            if forward is None:
                forward = module.forward = partial(_attend, module, number, [])
            forward.args[2].append(hooks)

    def remove(self, hooks: Any) -> None:
        """Undo `register`. May be repeated."""
        for module in self.modules:
            forward = vars(module).get("forward")
            if forward is None:
                continue
            forward.args[2][:] = [each for each in forward.args[2] if each is not hooks]
            if not forward.args[2]:
                del module.forward

    def enter(self, decoder: Any, context: SoftContext, kwargs: dict[str, Any]) -> None:
        """Refuse gradient checkpointing in a forward of the encoder with a prefix."""
        if context.layers is not None and decoder.training and checkpointing.is_on(decoder):
            raise ValueError(
                f"{type(decoder).__name__} keeps its own attention, where recomputed blocks would ignore the prefix: "
                "call gradient_checkpointing_disable()"
            )


def _attend(module: Any, number: int, served: list[Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Replaces the forward of an attention module: runs the original one, except in calls with a prefix."""
    call = call_scope.current()
    context = call.context if call is not None and any(call.hooks is each for each in served) else None
    if context is None or (context.layers is None and context.capture is None):
        return type(module).forward(module, *args, **kwargs)
    operands = _READERS[type(module).__name__](module, *args, **kwargs)
    query, key, value = operands.query, operands.key, operands.value
    if context.capture is not None:
        context.capture.append(BlockInputs(module, key, value, None, False))
    prefix = context.of_layer(number, len(query), query.dtype, query.device)
    out = masked_attention(
        query, key, value, operands.allowed, operands.bias, prefix, scale=operands.scale, softcap=None, sinks=None,
        backend=context.backend,
    )  # fmt: skip
    return operands.output(out.transpose(1, 2).flatten(2))
