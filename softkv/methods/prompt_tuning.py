"""Prompt-tuning: k learned embeddings next to the prompt (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from softkv.methods import initial
from softkv.methods.base import FrozenModel, Method, SoftTokens
from softkv.methods.template import check_no_soft_tokens

LENGTH = 20  # Lester et al. find little gain beyond


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """k learned embeddings, inserted after a row's prompt (before its answer) or before the whole row.

    Trainable: `k·C` values, fp32, as `embeddings [k, C]`.

    Args:
        length: k, the number of soft tokens; None: the text's with `init="text"`, else 20.
        position: "after" the prompt's embeddings, before the answer; or "before" the prompt.
        init: "vocabulary" (embeddings of distinct common tokens, which the paper found better than random), "random"
            (normal, as large as the base's embeddings), or "text" (the embeddings of `init_text`).
        init_text: tokenised without special tokens; repeated or truncated to `length`.
        template: how `encode` builds a row; it has no soft tokens, because the block is inserted automatically.

    Raises:
        ValueError: if fields are inconsistent.

    Example:
        >>> softkv.attach(base, softkv.PromptTuning(length=2)).num_trainable()  # k·C
        64
    """

    length: int | None = None
    position: Literal["after", "before"] = "after"
    init: initial.Init = "vocabulary"
    init_text: str | None = None
    template: str = "[X] [Y]"
    in_rows: ClassVar[bool] = True
    suits: ClassVar[str] = "the fewest parameters, works on any causal model; learns well on large bases"
    learns: ClassVar[str] = "n·C"

    @classmethod
    def of_length(cls, length: int) -> Self:
        return cls(length=length, position="before", init="random")

    def __post_init__(self) -> None:
        initial.check_choice("init", self.init, ("random", "vocabulary", "text"))
        initial.check_init(self.init, self.init_text, self.length)
        initial.check_choice("position", self.position, ("after", "before"))
        check_no_soft_tokens(self.template, "PromptTuning")

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftTokens:
        """`SoftTokens` with `embeddings [k, embedding_size]`."""
        embeddings = self._empty(base) if folded else self._initial(base)
        return SoftTokens(replace(self, length=len(embeddings)), embeddings, self.position)

    def _empty(self, base: FrozenModel) -> Tensor:
        if self.length is None:
            raise ValueError("length expects the number of saved soft tokens, got None")
        return torch.zeros(self.length, base.shape.embedding_size)

    def _initial(self, base: FrozenModel) -> Tensor:
        if self.init == "text":
            assert self.init_text is not None
            return initial.embeddings(base, initial.text_ids(base, self.init_text, self.length, special=False))
        length = self.length or LENGTH
        if self.init == "vocabulary":
            return initial.embeddings(base, initial.sampled_ids(base, length))
        return torch.randn(length, base.shape.embedding_size) * initial.embedding_std(base)
