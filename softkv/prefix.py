"""`Prefix`: soft keys and values that every row of a batch may attend to, before its own tokens.

Prefix slots occupy positions 0..P-1, and a row's first real token has position P. Keys are stored as attention sees
them (after RoPE and q/k-norm), so a learned prefix, the cached K/V of a prompt and a PEFT checkpoint are
interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Reader = Callable[..., tuple[list[Tensor], list[Tensor]]]
_reader: Reader | None = None


def read_models_by(reader: Reader) -> None:
    """Register the function that runs a model and returns the K and V of every layer. `softkv.hf` does so on import;
    this module can't import it."""
    global _reader
    _reader = reader


@dataclass(frozen=True)
class Prefix:
    """Soft keys and values for attention.

    Args:
        k, v: `[L or 1, A, G, P, D]` and `[L or 1, A, G, P, Dv]`, of one floating dtype. A leading 1 means one pair for
            all layers; A is the number of prefixes (1: shared by all rows of a batch). Dv equals D except in multi-head
            latent attention and similar.
        lengths: `[A]` integers, the number of slots in use of each prefix; None: all P.
        window_covers: whether sliding-window layers count the slots as the positions just before the first token.
            True for K/V of real tokens, False for learned ones, which stay visible to every query.

    Raises:
        ValueError: if shapes or dtypes don't match.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor | None = None
    window_covers: bool = False

    def __post_init__(self) -> None:
        if self.k.dim() != 5 or self.v.dim() != 5 or self.k.shape[:4] != self.v.shape[:4]:
            raise ValueError(
                "Prefix expects k [L or 1, A, G, P, D] and v [L or 1, A, G, P, Dv], equal except in the last dim, "
                f"got {tuple(self.k.shape)} and {tuple(self.v.shape)}"
            )
        if self.k.dtype != self.v.dtype:
            raise ValueError(f"Prefix expects k and v of one dtype, got {self.k.dtype} and {self.v.dtype}")
        if self.lengths is not None and self.lengths.shape != self.k.shape[1:2]:
            raise ValueError(f"Prefix expects lengths of shape [{self.count}], got {tuple(self.lengths.shape)}")

    @property
    def count(self) -> int:
        """A, the number of prefixes."""
        return self.k.shape[1]

    @property
    def length(self) -> int:
        """P, the number of slots (of the longest prefix)."""
        return self.k.shape[3]

    def layers(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """The (k, v) of each of `number` layers, views `[A, G, P, D]` and `[A, G, P, Dv]`. They are unbound once, so
        that autograd writes a single gradient for all layers."""
        keys, values = self.k.unbind(0), self.v.unbind(0)
        if len(keys) == 1:
            keys, values = keys * number, values * number
        if len(keys) != number:
            raise ValueError(f"this prefix has {len(keys)} layers, the model has {number}")
        return list(zip(keys, values, strict=True))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """The same prefix on another device or in another floating dtype."""
        if device is None and dtype in (None, self.k.dtype):
            return self
        lengths = self.lengths if self.lengths is None else self.lengths.to(device)
        return replace(self, k=self.k.to(device, dtype), v=self.v.to(device, dtype), lengths=lengths)

    @classmethod
    def from_cache(cls, cache: Any) -> Prefix:
        """Make a prefix of real tokens from the K/V of a transformers cache.

        Args:
            cache: a cache with `keys` `[A, G, P, D]` and `values` `[A, G, P, Dv]` of the same P tokens in every layer
                (a `DynamicCache` after one unpadded forward). The filled part of a static cache is used.

        Raises:
            ValueError: if a sliding-window layer has dropped tokens, or a layer has no K/V.

        Models with multi-head latent attention keep compressed K/V in their caches: use `from_text` or `from_ids`.
        """
        if not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers):
            raise ValueError("a prefix needs K/V in every layer: this cache has layers without any (empty, or states)")
        keys, values = [], []
        for layer in cache.layers:
            filled, held = int(layer.get_seq_length()), layer.keys.shape[2]
            if filled > held:
                raise ValueError(
                    f"a prefix needs K/V of every token, but a sliding-window layer has dropped some: it holds {held} "
                    f"of {filled} (fill a cache made without the config)"
                )
            keys.append(layer.keys[:, :, :filled])
            values.append(layer.values[:, :, :filled])
        return cls.from_layers(keys, values)

    @classmethod
    def from_layers(cls, keys: list[Tensor], values: list[Tensor]) -> Prefix:
        """Stack the K/V of real tokens, keys `[A, G, P, D]` and values `[A, G, P, Dv]` per layer, into a prefix."""
        for name, tensors in (("keys", keys), ("values", values)):
            shapes = sorted({tuple(tensor.shape) for tensor in tensors})
            if len(shapes) != 1:
                raise ValueError(f"a prefix needs {name} of one shape in every layer, got {shapes}")
        return cls(torch.stack(keys), torch.stack(values), window_covers=True)

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, text: str) -> Prefix:
        """Run a text through the model once and keep its K/V: with this prefix, the model's outputs equal those with
        the text in the context.

        Args:
            model: a transformers causal LM. The soft prompt of a `SoftModel` is not applied.
            tokenizer: its tokenizer; the text is tokenised with special tokens (a BOS if it adds one).
            text: at least one token long.

        Raises:
            ValueError: if the text has no tokens, or K/V alone can't represent it, because the model is bidirectional
                or has state other than attention's.

        Example:
            >>> prefix = softkv.Prefix.from_text(base, tokenizer, "w5 w6")
            >>> prefix.length  # a BOS and two words
            3
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> model.add_adapter("text", prefix)
        """
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"Prefix.from_text expects a text of at least one token, got {text!r}")
        return cls.from_ids(model, torch.tensor([ids], device=model.device))

    @classmethod
    def from_ids(cls, model: Any, input_ids: Tensor, *, standing_in: bool = True) -> Prefix:
        """Run `input_ids` `[A, P]` through the model once and keep their K/V.

        Args:
            model: as in `from_text`.
            input_ids: the tokens.
            standing_in: whether the prefix must be equivalent to the tokens in the context; with False, the K/V of any
                model are accepted.
        """
        return cls._from_inputs(model, standing_in, input_ids=input_ids)

    @classmethod
    def from_embeddings(cls, model: Any, inputs_embeds: Tensor) -> Prefix:
        """Run input embeddings `[A, P, C]`, in the model's dtype, through the model once and keep their K/V."""
        return cls._from_inputs(model, True, inputs_embeds=inputs_embeds)

    @classmethod
    def _from_inputs(cls, model: Any, standing_in: bool, **inputs: Tensor) -> Prefix:
        if _reader is None:
            raise RuntimeError("a prefix from a model's own K/V needs softkv.hf: import softkv.hf first")
        for name, tokens in inputs.items():
            axes, ids = ("[A, P, C]", False) if name == "inputs_embeds" else ("[A, P]", True)
            fits = isinstance(tokens, Tensor) and tokens.dim() == 3 - ids and tokens.shape[:2].numel() > 0
            if not fits or tokens.is_floating_point() == ids or (ids and not tokens.is_meta and int(tokens.min()) < 0):
                got = f"{list(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
                raise ValueError(f"{name} expects {'ids of tokens' if ids else 'floats'} {axes}, not empty, got {got}")
        base = model.base if hasattr(model, "disabled") else model
        return cls.from_layers(*_reader(base, standing_in=standing_in, **inputs))
