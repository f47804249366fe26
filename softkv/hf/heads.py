"""Soft tokens in front of rows, run in one pass with the rows.

In a causal decoder, what stands in front of a row does not depend on it. So the heads of a batch are a few more rows at
the beginning of its line, [head 1 | … | head A | rows], and in each block their own keys and values are the prefix that
the rows behind them read: a view, with gradients. Behind the decoder the heads are cut off.
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
from softkv.hf.repeat import OfPass

# Keywords of a decoder that are arranged here, what they ask for too; others must say nothing of single tokens.
_ARRANGED = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip


@dataclass(frozen=True)
class HeadLine:
    """A line of A heads of P tokens, and behind them the rows of a batch: B of T columns, or packed ones (B = 1).

    Attributes:
        heads: (A, P)
        rows: (B, T)
        mask: `[B, T]`, the real tokens of padded rows, or None for all.
        of_heads: what attention among the heads is given.
        states: the key states of padded rows, by that of the line.
    """

    heads: tuple[int, int]
    rows: tuple[int, int]
    mask: Tensor | None
    of_heads: SoftContext
    states: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, context: SoftContext, kwargs: dict[str, Any]) -> HeadLine | None:
        """The line of a forward of the decoder whose context holds heads, or None where some argument has a column for
        each token that can't be arranged: images' positions, masks of a model's own."""
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
        of_heads = SoftContext(backend=context.backend, repeats=OfPass())
        return cls((A, P), (tokens.shape[0], tokens.shape[1]), mask, of_heads)

    def lead(self, heads: Tensor, kwargs: dict[str, Any], embed: Callable[[Tensor], Tensor], first: int) -> None:
        """Puts the line in place of the rows.

        Args:
            heads: `[A, P, C]`
            kwargs: of the decoder, positions `[B or 1, T]` among them.
            embed: the embeddings of ids.
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
        """The decoder's output for the rows alone."""
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = self._of_rows(value)
            elif isinstance(value, tuple | list):
                output[name] = type(value)(self._of_rows(x) if isinstance(x, Tensor) else x for x in value)
        return output

    def _of_rows(self, states: Tensor) -> Tensor:
        """Of hidden states `[1, N, C]` or of what routers say of tokens `[N, E]`, those of the rows."""
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
        """Attention of one block, `[1, N, H, Dv]`: of the heads each to itself, of the rows to themselves and theirs.

        Args:
            attend: attention `[B, T, H, Dv]` of some rows under a context.
            context: of the rows.
            operands: query `[1, H, N, D]`, key `[1, G, N, D]` and value `[1, G, N, Dv]`.
            mask: the key state of the line.
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
        if torch.compiler.is_compiling():  # a tracer can't tell states by their `id`
            return state_of_rows(mask, self.mask)
        if id(mask) not in self.states:
            self.states[id(mask)] = mask, state_of_rows(mask, self.mask)  # kept, so that no other gets its `id`
        return self.states[id(mask)][1]


def _whole(line: Tensor | None) -> Tensor | None:
    """The key state of rows without padding, by that of the line, which in a compiled frame counts tokens."""
    return state_of_rows(line, None) if torch.compiler.is_compiling() else line


def _of_tokens(name: str, value: Any) -> bool:
    """Whether a keyword may say something of single tokens, or asks for something of them."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return isinstance(value, list | tuple | dict) or (name.startswith("output_") and bool(value))
