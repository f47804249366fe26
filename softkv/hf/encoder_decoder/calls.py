"""State of one call of an encoder-decoder with soft prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softkv.hf.context import SoftContext
from softkv.hf.prefixes import RowTokens, SoftRows
from softkv.methods.where import Site, sections, where_of
from softkv.prefix import Prefix

if TYPE_CHECKING:
    from softkv.hf.encoder_decoder.hooks import EncoderDecoderHooks

Contexts = Mapping[Site, SoftContext]


@dataclass(frozen=True)
class UnchangedPrompts:
    """The `prompts` of a `generate` that adds no columns to the given ids."""

    view: None = None


@dataclass(frozen=True)
class EncoderDecoderCall:
    """One running `forward` or `generate` of an encoder-decoder, as its pre-hooks see it.

    Attributes:
        hooks: of the called SoftModel.
        soft: the soft prompts of its rows; None in a run of the bare stacks.
        contexts: the prefixes at each site.
        tokens: the soft tokens in the encoder's rows, or None.
        rows: the number of rows in each stack that has a prefix, set when the stack starts.
        read: the number of rows in the encoder's first run; empty before it.
        ids: `[B, S]`, replaces the ids that reach the encoder, or None.
        prompts: of a `generate`.
        model: the SoftModel, in a `generate`.
    """

    hooks: EncoderDecoderHooks
    soft: SoftRows | None = None
    contexts: Contexts = field(default_factory=dict)
    tokens: RowTokens | None = None
    rows: dict[Site, int] = field(default_factory=dict)
    read: list[int] = field(default_factory=list)
    ids: Tensor | None = None
    prompts: UnchangedPrompts | None = None
    model: Any = None
    may_be_packed: ClassVar[bool] = False  # encoder-decoders only take padded rows

    def context(self, site: Site) -> SoftContext:
        return self.contexts.get(site, SoftContext())

    def check_all_rows(self, rows: int) -> None:
        """Refuse an encoder run on a subset of the batch if rows have different adapters. Whisper re-runs unfinished
        recordings and those whose output it rejects, without their indices."""
        if self.soft is None or len(self.soft.names) == 1 or torch.compiler.is_compiling():
            return
        self.read[:] = self.read or [rows]
        if rows != self.read[0]:
            raise ValueError(
                f"{type(self.hooks.base).__name__} re-runs some rows of a batch without saying which: expected one "
                "adapter for all rows, got several adapter_names (use one batch per adapter, or recordings of a single "
                "window at one temperature)"
            )


def contexts_of(soft: SoftRows, counts: Sequence[tuple[Site, int]], like: Tensor) -> dict[Site, SoftContext]:
    """The prefixes of a call at each site.

    Args:
        counts: the sites of the model, with the number of blocks at each.
        like: a tensor with the device and dtype of the model.
    """
    prefixes: dict[Site, dict[str, Prefix]] = {site: {} for site, _ in counts}
    for name, each in soft.softs.items():
        prefix = each.prefix()
        if prefix is None:
            continue
        prefix = prefix.to(dtype=like.dtype)
        for site, layers in sections(counts, where_of(each.config) or ()).items():
            prefixes[site][name] = prefix if len(prefix.k) == 1 else _layers_of(prefix, layers)
    return {site: soft.context(prefixes[site], blocks, like.device) for site, blocks in counts}


def _layers_of(prefix: Prefix, layers: slice) -> Prefix:
    return Prefix(prefix.k[layers], prefix.v[layers], prefix.lengths, prefix.window_covers)


def check_same_bias(context: SoftContext, name: str) -> None:
    """Refuse rows whose slots would need different relative position biases."""
    if isinstance(context.window_covers, Tensor) or (context.window_covers and context.lengths is not None):
        raise ValueError(
            f"relative position biases of {name} expect prefixes of one length and one window_covers in a batch, got "
            "different ones: use one batch per adapter"
        )
