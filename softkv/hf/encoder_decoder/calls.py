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
class Unchanged:
    """The prompts of a `generate` whose columns stay as they are."""

    view: None = None


@dataclass(frozen=True)
class EncoderDecoderCall:
    """One running `forward` or `generate`, as the pre-hooks see it.

    Attributes:
        hooks: of the model that was called.
        soft: the soft prompts of its rows; None in a run of the bare stacks.
        contexts: the prefixes at each site.
        tokens: the soft tokens in the encoder's rows, or None.
        rows: how many rows each stack reads whose tokens stand behind slots; known once it is entered.
        read: how many rows the encoder has read at first, once it has.
        ids: `[B, S]`, the ids that the encoder reads in place of those that reach it, or None.
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
    prompts: Unchanged | None = None
    model: Any = None
    may_be_packed: ClassVar[bool] = False  # its rows are padded

    def context(self, site: Site) -> SoftContext:
        return self.contexts.get(site, SoftContext())

    def check_whole(self, rows: int) -> None:
        """Refuses to read some rows of a batch again, where it matters which: Whisper goes on with recordings that are
        not at their end, or whose answer it rejects."""
        if self.soft is None or len(self.soft.names) == 1 or torch.compiler.is_compiling():
            return
        self.read[:] = self.read or [rows]
        if rows != self.read[0]:
            raise ValueError(
                f"{type(self.hooks.base).__name__} goes on with some rows of a batch, of which it does not tell which: "
                "expected one adapter for all rows, got several adapter_names (give the rows of each in a batch of "
                "their own, or recordings of one window at one temperature)"
            )


def contexts_of(soft: SoftRows, counts: Sequence[tuple[Site, int]], like: Tensor) -> dict[Site, SoftContext]:
    """The prefixes of a call at each site.

    Args:
        counts: the sites of the model and how many blocks each has.
        like: on the device and of the dtype of the model.
    """
    prefixes: dict[Site, dict[str, Prefix]] = {site: {} for site, _ in counts}
    for name, each in soft.softs.items():
        prefix = each.prefix()
        if prefix is None:
            continue
        prefix = prefix.to(dtype=like.dtype)
        for site, layers in sections(counts, where_of(each.config) or ()).items():
            prefixes[site][name] = prefix if len(prefix.k) == 1 else _part(prefix, layers)
    return {site: soft.context(prefixes[site], blocks, like.device) for site, blocks in counts}


def _part(prefix: Prefix, layers: slice) -> Prefix:
    return Prefix(prefix.k[layers], prefix.v[layers], prefix.lengths, prefix.window_covers)


def check_counted(context: SoftContext, name: str) -> None:
    """Refuses rows whose slots a relative position bias would count differently."""
    if isinstance(context.window_covers, Tensor) or (context.window_covers and context.lengths is not None):
        raise ValueError(
            f"rows of one batch expect prefixes of one length that the position biases of {name} all count or all "
            "leave out (window_covers): give rows of such adapters in batches of their own"
        )
