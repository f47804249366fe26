"""Soft tokens in front of rows, computed in the same pass as the rows.

In a causal decoder, what precedes a row does not depend on it. The heads of a batch are therefore additional rows at
the start of the packed sequence, [head 1 | … | head A | rows], and in each block their keys and values are the prefix
of the rows after them: a view, with gradients. The decoder's output is cut to the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from softkv.hf.context import SoftContext
from softkv.hf.masks import state_of_rows
from softkv.hf.prefixes import behind
from softkv.hf.repeat import PassCalls

# Keywords of a decoder that are handled here, with the outputs that they request; others must not refer to single
# tokens.
_ARRANGED = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip


@dataclass(frozen=True)
class PackedHeads:
    """A packed sequence of A heads of P tokens, followed by the rows of a batch: B of T columns, or packed ones (B =
    1).

    Attributes:
        heads: (A, P)
        rows: (B, T)
        mask: `[B, T]`, the real tokens of padded rows, or None for all.
        of_heads: the arguments of attention among the heads.
        states: the key states of padded rows, by that of the packed sequence.
    """

    heads: tuple[int, int]
    rows: tuple[int, int]
    mask: Tensor | None
    of_heads: SoftContext
    states: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, context: SoftContext, kwargs: dict[str, Any]) -> PackedHeads | None:
        """The packed sequence for a forward of the decoder whose context has heads, or None if an argument refers to
        single tokens in a way that can't be handled: positions of images, the model's own masks."""
        assert context.heads is not None
        mask, positions = kwargs.get("attention_mask"), kwargs["position_ids"]
        if positions.dim() != 2 or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            return None
        if kwargs.get("past_key_values") is not None or any(
            _of_tokens(name, value) for name, value in kwargs.items() if name not in _ARRANGED
        ):
            return None
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        A, P, _ = context.heads.shape
        of_heads = SoftContext(backend=context.backend, kept_calls=PassCalls())
        return cls((A, P), (tokens.shape[0], tokens.shape[1]), mask, of_heads)

    def lead(self, heads: Tensor, kwargs: dict[str, Any], embed: Callable[[Tensor], Tensor], first: int) -> None:
        """Replace the rows by the packed sequence.

        Args:
            heads: `[A, P, C]`
            kwargs: of the decoder, including positions `[B or 1, T]`.
            embed: returns the embeddings of ids.
            first: the position id of a head's first token.
        """
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = embed(kwargs["input_ids"])
        line = torch.cat([heads.to(embeds.dtype).flatten(0, 1), embeds.flatten(0, 1)])
        positions = kwargs["position_ids"].expand(self.rows)
        front = (torch.arange(self.heads[1], device=positions.device) + first).expand(self.heads)
        kwargs["position_ids"] = torch.cat([front.flatten(), positions.flatten()])[None]
        kwargs["inputs_embeds"], kwargs["input_ids"], kwargs["attention_mask"] = line[None], None, None

    def leave(self, output: Any) -> Any:
        """The decoder's output for the rows only."""
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = self._of_rows(value)
            elif isinstance(value, tuple | list):
                output[name] = type(value)(self._of_rows(x) if isinstance(x, Tensor) else x for x in value)
        return output

    def _of_rows(self, states: Tensor) -> Tensor:
        """The rows' share of hidden states `[1, N, C]` or router outputs `[N, E]`."""
        (A, P), (B, T) = self.heads, self.rows
        N = A * P + B * T
        if states.shape[:2] == (1, N):
            return states[:, A * P :].view(B, T, *states.shape[2:])
        return states[A * P :] if states.shape[0] == N else states

    def attention(
        self,
        attend: Callable[[SoftContext, Sequence[Tensor], Tensor | None], Tensor],
        context: SoftContext,
        layer: int,
        operands: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of one block, `[1, N, H, Dv]`: each head attends to itself, each row to itself and its head.

        Args:
            attend: computes attention `[B, T, H, Dv]` of rows with a context.
            context: of the rows.
            operands: query `[1, H, N, D]`, key `[1, G, N, D]` and value `[1, G, N, Dv]`.
            mask: the key state of the packed sequence.
        """
        (A, P), (B, T) = self.heads, self.rows
        heads, rows = [], []
        for x in operands:
            head, row = x.transpose(1, 2).split([A * P, B * T], 1)
            heads.append(head.view(A, P, *head.shape[2:]).transpose(1, 2))
            rows.append(row.view(B, T, *row.shape[2:]).transpose(1, 2))
        kv = heads[1], heads[2]
        if context.layers is not None:
            kv = behind(context.layers[layer], kv)
        of_rows = replace(context, line=None, layers={layer: kv})
        outs = (
            attend(self.of_heads, heads, _whole(mask)),
            attend(of_rows, rows, self._state(mask)),
        )
        return torch.cat([out.flatten(0, 1) for out in outs])[None]

    def _state(self, mask: Tensor | None) -> Tensor | None:
        """The key state of the rows."""
        if self.mask is None:
            return _whole(mask)
        if torch.compiler.is_compiling():  # a tracer can't identify states by their `id`
            return state_of_rows(mask, self.mask)
        if id(mask) not in self.states:
            self.states[id(mask)] = mask, state_of_rows(mask, self.mask)  # kept alive, so that its `id` is not reused
        return self.states[id(mask)][1]


def _whole(line: Tensor | None) -> Tensor | None:
    """The key state of rows without padding, from that of the packed sequence, which counts tokens in a compiled
    frame."""
    return state_of_rows(line, None) if torch.compiler.is_compiling() else line


def _of_tokens(name: str, value: Any) -> bool:
    """Whether a keyword may refer to single tokens, or request an output per token."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return isinstance(value, list | tuple | dict) or (name.startswith("output_") and bool(value))
