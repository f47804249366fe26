"""Multiple choice: rows `[B, n, T]` of n choices each. The base runs every choice as a row, and so does softkv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softkv.hf.checks import described

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")


@dataclass(frozen=True)
class Choices:
    """A base that scores `count` choices, called with one choice per row.

    Attributes:
        base: the model.
        count: n.
    """

    base: Any
    count: int

    @classmethod
    def of(cls, base: Any, ids: Any, embeds: Any) -> Choices:
        """From the tokens of a batch.

        Raises:
            ValueError: if they have no axis of choices.
        """
        tokens, axes = (embeds, "[B, choices, T, C]") if ids is None else (ids, "[B, choices, T]")
        if not isinstance(tokens, Tensor) or tokens.dim() != axes.count(",") + 1:
            name = "inputs_embeds" if ids is None else "input_ids"
            raise ValueError(f"{type(base).__name__} expects {name} {axes}, got {described(tokens)}")
        return cls(base, tokens.shape[1])

    def flat(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with one choice per row.

        Raises:
            ValueError: if an input has another number of choices.
        """
        if batch.get("position_ids") is not None:  # not every base supports them for choices
            raise ValueError(f"{type(self.base).__name__} computes the positions of choices: leave position_ids out")
        rows = dict(batch)
        for name in (*_OF_TOKENS, "prompt_lengths"):
            x = batch.get(name)
            if x is None:
                continue
            if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != self.count:
                raise ValueError(
                    f"{name} expects [B, {self.count}, ...], {self.count} choices a row, got {described(x)}"
                )
            rows[name] = x.flatten(0, 1)
        names: Sequence[str | None] | None = batch.get("adapter_names")
        if names is not None and not isinstance(names, str):
            rows["adapter_names"] = [name for name in names for _ in range(self.count)]
        return rows

    def __call__(self, **keywords: Any) -> Any:
        """The base's output."""
        given = {name: keywords[name] for name in _OF_TOKENS if isinstance(keywords.get(name), Tensor)}
        return self.base(**keywords | {name: x.unflatten(0, (-1, self.count)) for name, x in given.items()})
