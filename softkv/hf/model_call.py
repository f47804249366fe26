"""One running `forward` or `generate`, as the pre-hooks see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softkv.hf.context import SoftContext
from softkv.hf.prefixes import SoftRows

if TYPE_CHECKING:
    from softkv.hf.generation.prompts import Prompts
    from softkv.hf.probe import DecoderProbe


@dataclass(frozen=True)
class ModelCall:
    """One running `forward` or `generate`, as the pre-hooks see it.

    Attributes:
        hooks: of the called SoftModel. Those of others on the same base ignore the call.
        context: passed to the attention blocks.
        soft: the soft prompts of the rows; None in a run of the bare decoder.
        prompts: of a `generate`.
        soft_tokens: `[K, C]`, of a `generate` whose prompts contain soft tokens.
        positions_given: whether the user passed position ids.
        model: the SoftModel, in a `generate`.
        embeds: `[B, T, C]`, embeddings that the decoder reads instead of its ids, or None.
        soft_at: `[B, T]`, the columns where it does, in a wrapper that puts images into others; None: all.
        kept: the positions whose logits are needed, if transformers has no argument for it.
        position_ids: of the running forward, if the decoder's table of positions does not get them otherwise.
    """

    hooks: DecoderProbe
    context: SoftContext
    soft: SoftRows | None = None
    prompts: Prompts | None = None
    soft_tokens: Tensor | None = None
    positions_given: bool = False
    model: Any = None
    embeds: Tensor | None = None
    soft_at: Tensor | None = None
    kept: Tensor | None = None
    position_ids: list[Tensor] = field(default_factory=list)

    @property
    def may_be_packed(self) -> bool:
        """Whether the user's position ids may restart and are the only mark of packed rows."""
        return self.positions_given and self.context.rows is None and self.context.restarts is None
