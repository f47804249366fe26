"""P-tuning v2: soft keys and values per layer (Liu et al. 2021, arXiv:2110.07602), learned as matrices or computed by
an encoder from each row's prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from softkv.methods import initial
from softkv.methods.base import BaseShape, FrozenModel, Method, SoftMatrices, SoftPrompt
from softkv.methods.encoders import HEADS, build_rows
from softkv.methods.matrices import (
    INIT_STD,
    LENGTH,
    REPARAMETRIZE_SIZE,
    ReparametrizedMatrices,
    check_matrices,
    empty_matrices,
    initial_matrices,
    resolved_init,
)
from softkv.methods.template import begin_ids, check_no_soft_tokens
from softkv.methods.where import Site, checked_where
from softkv.prefix import Prefix, stacked

ENCODER_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """One key and one value matrix of n slots per attention block.

    Without an encoder these are learned matrices. Trainable: `n·G·(D + Dv)·L` values, fp32, as `k [L, 1, G, n, D]` and
    `v [L, 1, G, n, Dv]`: `2·n·G·D·L` but for multi-head latent attention, whose values have a width of their own. Where
    layers differ in G, D or Dv, as `k_0 [1, G, n, D]`, `v_0 [1, G, n, Dv]`, `k_1`, …: a K and a V of each layer's own.
    Layers that read keys and values of an earlier one (Gemma 3n, Gemma 4) have a K and a V of their own too.

    With an encoder they are computed for each row and attention block from the hidden states of the row's prompt that
    the attention receives (normalised, in a pre-norm model): encoder, average pool to n slots, MLP
    E → E → G·(D + Dv). Trainable, once (`share_encoder`) or L times:

    - "lstm", bidirectional with E/2 units per direction: `2·(4·E/2·(C + E/2 + 2))`;
      "attention", one transformer layer: `E·(C + 1) + 4·E + E·(12·E + 9)`;
    - the MLP: `E·(E + 1) + G·(D + Dv)·(E + 1)`; an encoder of layers that differ has one for each G, D and Dv.

    A custom encoder module is copied when the method is built. Its `forward(hidden, mask)` takes hidden states `[R, M,
    C]` in fp32, 0 at padding, and a mask `[R, M]`, True at the prompt's positions (a row may have none), and returns
    states `[R, M, E]` with any E. States at padding are not read, and must not influence other positions, so that a
    row's result doesn't depend on other rows.

    Args:
        length: n; None: the text's number of tokens with `init="text"` (including a BOS if the tokenizer adds one),
            else 32.
        init: the model's own K/V of common tokens ("vocabulary") or of `init_text` ("text": before training, this is
            equivalent to that text in the context, also in sliding-window layers); or "random". None: "vocabulary", or
            "random" with `init_std`. Networks (`reparametrize`, `encoder`) start at random.
        init_text: repeated or truncated to `length`.
        init_std: standard deviation of random values. None: a twentieth of the size of the model's own K and V in each
            layer; 0.1 for a network.
        reparametrize: compute the matrices with an MLP from learned embeddings during training; `folded` keeps the
            plain matrices.
        reparametrize_size: width of these embeddings and of the MLP; 512 if None.
        encoder: None, "lstm", "attention" or an `nn.Module`. With a module, the field becomes "custom", and a config
            read from a file needs the module again: `dataclasses.replace(config, encoder=module)`.
        encoder_size: E of "lstm" (even) and "attention" (a multiple of 4, its heads); 256 if None.
        share_encoder: one encoder for all blocks, or one per block.
        window_covers: whether sliding windows, and the relative position biases of T5, count the slots as the positions
            before the first token; None: only with `init="text"`, where the slots start as real tokens.
        continues: rows continue a text that the prefix contains from its beginning, so `encode` adds no BOS.
        where: in an encoder-decoder, which attention has a prefix: "encoder" and "decoder" (self-attention), "cross"
            (from the decoder to the encoder); None: all that softkv supports on the model. L counts the blocks of
            these. None in other models.
        template: how `encode` builds a row; it has no soft tokens.

    Raises:
        ValueError: if fields are inconsistent.

    Example:
        >>> softkv.attach(base, softkv.PTuningV2(length=4)).num_trainable()  # 2·n·G·D·L
        256
    """

    length: int | None = None
    init: initial.Init | None = None
    init_text: str | None = None
    init_std: float | None = None
    reparametrize: bool = False
    reparametrize_size: int | None = None
    encoder: Literal["lstm", "attention", "custom"] | nn.Module | None = None
    encoder_size: int | None = None
    share_encoder: bool = True
    window_covers: bool | None = None
    continues: bool = False
    where: tuple[Site, ...] | None = None
    template: str = "[X] [Y]"
    suits: ClassVar[str] = "the usual choice; learns most, from real tokens (the default) or from a text (--init-text)"
    learns: ClassVar[str] = "2·n·G·D·L"

    def __post_init__(self) -> None:
        check_matrices(
            self.init, self.init_text, self.init_std, self.length, self.reparametrize, self.reparametrize_size
        )
        check_no_soft_tokens(self.template, "PTuningV2")
        initial.check_flag("share_encoder", self.share_encoder)
        self._check_encoder()
        if self.window_covers is not None:
            initial.check_flag("window_covers", self.window_covers)
        initial.check_flag("continues", self.continues)
        object.__setattr__(self, "where", checked_where(self.where))
        if self.window_covers is not None and (self.encoder is not None or self.reparametrize):
            raise ValueError(
                "window_covers is read for plain matrices only: leave it, the encoder or reparametrize out"
            )
        if isinstance(self.encoder, nn.Module):
            # Kept off the fields, which must survive JSON.
            object.__setattr__(self, "_module", self.encoder)
            object.__setattr__(self, "encoder", "custom")

    def _check_encoder(self) -> None:
        if self.encoder is None:
            if self.encoder_size is not None or not self.share_encoder:
                raise ValueError("encoder_size and share_encoder are only read with an encoder: set encoder=...")
            return
        if not isinstance(self.encoder, nn.Module):
            initial.check_choice("encoder", self.encoder, ("lstm", "attention", "custom", None))
        if self.init not in (None, "random") or self.reparametrize:
            raise ValueError(
                f'an encoder expects init="random" and reparametrize=False, got init={self.init!r} and '
                f"reparametrize={self.reparametrize}: it makes K and V from each row's prompt"
            )
        if self.encoder_size is not None:
            if self.encoder not in ("lstm", "attention"):
                raise ValueError('encoder_size is only read with encoder="lstm" or "attention": leave it out')
            initial.check_positive("encoder_size", self.encoder_size)
            multiple = 2 if self.encoder == "lstm" else HEADS
            if self.encoder_size % multiple:
                raise ValueError(f"encoder_size expects a multiple of {multiple}, got {self.encoder_size}")

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        """`SoftMatrices` with a K and a V for each layer, or the network that computes them."""
        if self.encoder is not None:
            return self._build_encoder(base)
        layers = base.shape.layers
        window_covers = self.init == "text" if self.window_covers is None else self.window_covers
        if folded:
            empty = empty_matrices(base.shape, layers, self.length)
            return SoftMatrices(self, empty.k, empty.v, window_covers=window_covers)
        if self.reparametrize:
            size, std = self.reparametrize_size or REPARAMETRIZE_SIZE, self.init_std or INIT_STD
            config = replace(self, length=self.length or LENGTH)
            return ReparametrizedMatrices(config, base.shape, layers, self.length or LENGTH, size, std)
        init = resolved_init(self.init, self.init_std)
        first = initial_matrices(base, self.length, init, self.init_text, self.init_std)
        config = replace(self, length=first.length, init=init)
        return SoftMatrices(config, first.k, first.v, window_covers=window_covers)

    def encode(self, tokenizer: Any, *, answer: str | None = None, **fields: str) -> dict[str, list[int]]:
        """One example as token ids, by the template; see `Method.encode`."""
        row = super().encode(tokenizer, answer=answer, **fields)
        begun = len(begin_ids(tokenizer)) if self.continues else 0
        return {name: ids[begun:] for name, ids in row.items()}

    def _build_encoder(self, base: FrozenModel) -> SoftPrompt:
        assert self.encoder is not None
        encoder = getattr(self, "_module", None) if self.encoder == "custom" else self.encoder
        if encoder is None:
            raise ValueError(
                "this PTuningV2 was made with an encoder of one's own, which a saved config can't hold: give the "
                "module again with dataclasses.replace(config, encoder=module)"
            )
        size, std = self.encoder_size or ENCODER_SIZE, self.init_std or INIT_STD
        config = replace(self, length=self.length or LENGTH)
        return build_rows(
            config, encoder, base.shape, slots=self.length or LENGTH, size=size, shared=self.share_encoder, std=std
        )


def matrices_of(prefix: Prefix, shape: BaseShape) -> SoftMatrices:
    """The K and V of a prefix as learned matrices of `PTuningV2`.

    Raises:
        ValueError: when it does not fit a model of this shape, or is not one prefix.
    """
    own = sorted(set(shape.reads))
    if own and len(prefix.k) == len(own):  # of a cache, which holds those of layers that have their own
        prefix = prefix.of_layers([own.index(layer) for layer in shape.reads])
    if not _fits(prefix, shape):
        slots = f"[{shape.layers} or 1, 1, {shape.kv_heads}, P, "
        expected = f"k {slots}{shape.head_dim}] and v {slots}{shape.value_dim}]"
        if shape.widths:
            expected = f"k [1, G, P, D] and v [1, G, P, Dv] of each layer, (G, D, Dv) = {[*map(tuple, shape.widths)]}"
        raise ValueError(f"the prefix does not fit this model: expected {expected}, got {prefix.shapes}")
    if prefix.lengths is not None:
        raise ValueError("one prefix has no slots that don't exist: expected lengths=None")
    k, v = (stacked(of) for of in zip(*prefix.layers(shape.layers), strict=True))
    covers = prefix.window_covers
    return SoftMatrices(PTuningV2(length=prefix.length, window_covers=covers), k, v, window_covers=covers)


def _fits(prefix: Prefix, shape: BaseShape) -> bool:
    if prefix.count != 1 or len(prefix.k) not in (1, shape.layers):
        return False
    return shape.by_layer == tuple((k.shape[1], k.shape[3], v.shape[3]) for k, v in prefix.layers(shape.layers))
