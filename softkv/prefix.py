"""`Prefix`: soft keys and values that every row of a batch may attend to, before its own tokens.

Prefix slots occupy positions 0..P-1, and a row's first real token has position P. Keys are stored as attention sees
them (after RoPE and q/k-norm), so a learned prefix, the cached K/V of a prompt and a PEFT checkpoint are
interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# K or V of all layers, `[L or 1, A, G, P, D]`; where layers differ in G or D, of each of L, `[A, G, P, D]`.
Layers = Tensor | tuple[Tensor, ...]
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
        k, v: `[L or 1, A, G, P, D]` and `[L or 1, A, G, P, Dv]`, one floating dtype. A leading 1 means one pair for all
            layers; A is the number of prefixes (1: shared by all rows of a batch). Dv is D but for multi-head latent
            attention and its like, whose values have a width of their own. Where layers differ in G, D or Dv, each is a
            tuple of L tensors, `[A, G, P, D]` and `[A, G, P, Dv]`.
        lengths: `[A]` integers, the slots of each prefix that exist, or None when all P do.
        window_covers: whether sliding-window layers count the slots as the positions just before the first token.
            True for K/V of real tokens, False for learned ones, which stay visible to every query.

    Raises:
        ValueError: if shapes or dtypes don't match.
    """

    k: Layers
    v: Layers
    lengths: Tensor | None = None
    window_covers: bool = False

    def __post_init__(self) -> None:
        if not _fit(self.k, self.v):
            raise ValueError(
                "Prefix expects k [L or 1, A, G, P, D] and v [L or 1, A, G, P, Dv], alike but for their widths, or "
                f"tuples of layers that differ in G too, got {self.shapes}"
            )
        dtypes = {each.dtype for of in (self.k, self.v) for each in (of if isinstance(of, tuple) else (of,))}
        if len(dtypes) > 1:
            raise ValueError(f"Prefix expects k and v of one dtype, got {' and '.join(sorted(map(str, dtypes)))}")
        if self.lengths is not None and self.lengths.shape != (self.count,):
            raise ValueError(f"Prefix expects lengths of shape [{self.count}], got {tuple(self.lengths.shape)}")

    @property
    def _any_keys(self) -> Tensor:
        """K `[..., A, G, P, D]` of some layers, which tell of all what they have in common."""
        return self.k if isinstance(self.k, Tensor) else self.k[0]

    @property
    def count(self) -> int:
        """A, the number of prefixes held."""
        return self._any_keys.shape[-4]

    @property
    def length(self) -> int:
        """P, the number of slots (of the longest prefix)."""
        return self._any_keys.shape[-2]

    @property
    def shapes(self) -> str:
        """Those of k and v, for messages."""
        return f"{_shapes(self.k)} and {_shapes(self.v)}"

    def layers(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """The (k, v) of each of `number` layers, `[A, G, P, D]` and `[A, G, P, Dv]`: views, unbound once so that
        autograd writes one gradient of the whole."""
        keys, values = _of_each(self.k), _of_each(self.v)
        if len(keys) == 1:
            keys, values = keys * number, values * number
        if len(keys) != number:
            raise ValueError(f"this prefix has {len(keys)} layers, the model has {number}")
        return list(zip(keys, values, strict=True))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """The same prefix on another device or in another floating dtype."""
        if device is None and dtype in (None, self._any_keys.dtype):
            return self
        lengths = self.lengths if self.lengths is None else self.lengths.to(device)
        return replace(self.map(lambda of_layers: of_layers.to(device, dtype)), lengths=lengths)

    def of_layers(self, numbers: Sequence[int]) -> Prefix:
        """The prefix of those layers, in this order."""
        k, v = (tuple(_of_each(of)[number] for number in numbers) for of in (self.k, self.v))
        return replace(self, k=stacked(k), v=stacked(v))

    def map(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """The prefix with K and V changed alike: `change` takes those of all layers or of one, `[..., A, G, P, D]`."""
        k, v = (change(of) if isinstance(of, Tensor) else tuple(map(change, of)) for of in (self.k, self.v))
        return replace(self, k=k, v=v)

    def of_each(self, rows: int) -> Prefix:
        """The only prefix that this holds as one for each of `rows` rows, a view."""
        return self.map(lambda of_layers: of_layers.expand(*of_layers.shape[:-4], rows, *of_layers.shape[-3:]))

    @classmethod
    def from_cache(cls, cache: Any) -> Prefix:
        """Make a prefix of real tokens from the K/V of a transformers cache.

        Args:
            cache: a cache with `keys` `[A, G, P, D]` and `values` `[A, G, P, Dv]` of the same P tokens in every layer
                (a `DynamicCache` after one unpadded forward). The filled part of a static cache is used.

        Raises:
            ValueError: if a sliding-window layer has dropped tokens, or a layer has no K/V.

        Models with multi-head latent attention keep compressed K/V in their caches: use `from_text` or `from_ids`.
        Layers that read keys and values of an earlier one have none in the cache: on their model they get that one's.
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
        """K/V of real tokens, keys `[A, G, P, D]` and values `[A, G, P, Dv]` a layer, as a prefix."""
        return cls(stacked(keys), stacked(values), window_covers=True)

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


def stacked(of_each: Sequence[Tensor]) -> Layers:
    """K or V of layers, `[A, G, P, D]` each, in one tensor where they are alike."""
    return torch.stack(list(of_each)) if len({each.shape for each in of_each}) == 1 else tuple(of_each)


def _of_each(of: Layers) -> tuple[Tensor, ...]:
    return of.unbind(0) if isinstance(of, Tensor) else of


def _fit(k: Layers, v: Layers) -> bool:
    if isinstance(k, Tensor) and isinstance(v, Tensor):
        return k.dim() == v.dim() == 5 and k.shape[:4] == v.shape[:4]
    keys, values = _of_each(k), _of_each(v)
    if not keys or any(each.dim() != 4 for each in (*keys, *values)):
        return False
    slots = {(each.shape[0], each.shape[2]) for each in keys}
    return len(slots) == 1 and [each.shape[:3] for each in keys] == [each.shape[:3] for each in values]


def _shapes(of: Layers) -> list[Any]:
    return list(of.shape) if isinstance(of, Tensor) else [list(each.shape) for each in of]
