"""Packed rows for models whose state would leak from row to row: padded for the base, its output packed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softkv.hf.context import PackedRows
from softkv.hf.layout import IGNORED


@dataclass(frozen=True)
class Unpacked:
    """N packed tokens as a padded batch `[R, L]`.

    Attributes:
        source: `[R, L]`, the packed index of the token in each column; 0 in padding.
        real: `[R, L]`
    """

    source: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: PackedRows) -> Unpacked:
        starts, lengths = rows.cu_seqlens[:-1].long(), rows.cu_seqlens.diff().long()
        at = torch.arange(rows.longest, device=starts.device)
        real = at < lengths[:, None]
        return cls(torch.where(real, starts[:, None] + at, 0), real)

    def run(self, forward: Callable[..., Any], batch: dict[str, Any], logits_to_keep: int | Tensor) -> Any:
        """The output of a forward of the rows, packed again.

        Args:
            batch: keywords, of which tensors `[1, N, ...]` are per token.
            logits_to_keep: as in transformers, in packed columns.
        """
        tokens = int(self.real.sum())
        batch = {name: self._padded(name, value, tokens) for name, value in batch.items()}
        kept = isinstance(logits_to_keep, Tensor) and logits_to_keep.dtype == torch.bool
        if kept:
            batch["logits_to_keep"] = self._padded("logits_to_keep", logits_to_keep.view(1, -1), tokens)  # type: ignore[union-attr]
        output = forward(**batch, attention_mask=self.real.long(), use_cache=False, return_dict=True)
        for name, value in output.items():
            if name == "logits" and not kept:
                line = self._in_line(value)
                keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                output[name] = line[:, keep]
            elif name == "last_hidden_state":
                output[name] = self._in_line(value)
            elif name == "hidden_states":
                output[name] = tuple(map(self._in_line, value))
        return output

    def _padded(self, name: str, line: Any, tokens: int) -> Any:
        if not isinstance(line, Tensor) or line.shape[:2] != (1, tokens):
            return line
        rows = line[0][self.source]
        padding = IGNORED if name == "labels" else 0
        return rows.masked_fill(~self.real.view(*self.real.shape, *[1] * (rows.dim() - 2)), padding)

    def _in_line(self, rows: Tensor) -> Tensor:
        return rows[self.real][None]
