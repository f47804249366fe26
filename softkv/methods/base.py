"""The interface of soft-prompt methods: a frozen config that builds a module of learned parameters.

Methods turn parameters into soft tokens or a `Prefix`. They depend on neither kernels nor transformers; `FrozenModel`
is their only interface to the frozen model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from softkv.methods.sharded import whole
from softkv.methods.template import Template, end_ids
from softkv.prefix import Layers, Prefix

Placement = Literal["before", "after", "inline"]

# Learning rates measured to work (docs/learning.md): for networks; for soft tokens, relative to their size; for keys
# and values, with a pair per layer or one for all.
NETWORK_RATE = 1e-3
TOKEN_RATE = 0.2
KEY_RATE, VALUE_RATE = 2e-2, 2e-2
SHARED_KEY_RATE, SHARED_VALUE_RATE = 1e-1, 3e-2


class Widths(NamedTuple):
    """The sizes of K and V in one layer."""

    kv_heads: int  # G
    head_dim: int  # D, of keys
    value_dim: int  # Dv, of values: D but for multi-head latent attention and its like

    @property
    def of_slot(self) -> int:
        """`G·(D + Dv)`, the values of one slot."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    def split(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K `[..., G, D]` and V `[..., G, Dv]` of slots `[..., G·(D + Dv)]`."""
        k, v = slots.split([self.kv_heads * self.head_dim, self.kv_heads * self.value_dim], -1)
        return k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1))


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a frozen model that determine the shapes of learned parameters."""

    layers: int  # L
    kv_heads: int  # G; this and the next two are 0 where layers differ in one of them
    head_dim: int  # D, of keys
    value_dim: int  # Dv, of values
    hidden_size: int  # C
    embedding_size: int  # width of the input embeddings (C except in a few OPT models)
    vocab_size: int
    widths: tuple[Widths, ...] = ()  # of each layer, where they differ
    reads: tuple[int, ...] = ()  # the layer whose keys and values each layer reads, where some read an earlier one's

    @property
    def by_layer(self) -> tuple[Widths, ...]:
        """The sizes of K and V in each layer."""
        return self.widths or (Widths(self.kv_heads, self.head_dim, self.value_dim),) * self.layers


def layers_like(widths: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """What a `BaseShape` says of layers with these (G, D, Dv), by its fields."""
    alike = len(set(widths)) == 1
    sizes = Widths(*widths[0]) if alike else Widths(0, 0, 0)
    of_each = () if alike else tuple(Widths(*each) for each in widths)
    return {"layers": len(widths), "widths": of_each, **sizes._asdict()}


class FrozenModel(Protocol):
    """What methods can ask of the frozen model. Token ids are on the CPU; results may be on any device and of any
    floating dtype."""

    shape: BaseShape

    def embed(self, ids: Tensor) -> Tensor:
        """The frozen input embeddings `[..., embedding_size]` of token ids, without gradient."""

    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        """The K/V of the tokens `ids` `[P]`, run through the frozen model. Raises if they must be equivalent to the
        tokens in the context and can't be."""

    def words(self) -> Tensor:
        """Ids `[n]` of the vocabulary that are words, in order: no special or added tokens, placeholders of images or
        audio, or unused rows."""

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens if `special`. Raises if no tokenizer was given."""


class Method(ABC):
    """The frozen config of a method: what is learned and where it goes. Its fields are JSON-serialisable
    (`dataclasses.asdict`).

    Attributes:
        in_rows: whether the method learns only soft tokens inside rows, which don't need softkv's attention.
        suits: when to use this method, as one line for `softkv methods`.
        learns: the number of trainable values, as a formula.
    """

    template: str
    in_rows: ClassVar[bool] = False
    suits: ClassVar[str] = ""
    learns: ClassVar[str] = ""

    @classmethod
    def of_length(cls, length: int) -> Self:
        """The method with `length` soft tokens or slots and random initialisation, for planning and profiling, where
        values don't matter."""
        return cls(length=length)  # type: ignore[call-arg]

    @abstractmethod
    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        """The module of learned parameters, in fp32 on the CPU, initialised for this frozen model.

        With `folded`, a module as returned by `SoftPrompt.folded`, with placeholder values into which saved ones are
        loaded. This needs neither a tokenizer nor a run of the model.
        """

    def encode(self, tokenizer: Any, *, answer: str | None = None, **fields: str) -> dict[str, list[int]]:
        """Encode one example as token ids, following the method's template.

        Args:
            tokenizer: a transformers tokenizer.
            answer: the text of `[Y]`; None for a prompt without an answer, as in generation.
            fields: the text of each field of the template (`X="..."` for `[X]`).

        Returns:
            `{"input_ids", "labels"}`, lists of equal length: soft token `[Pi]` has id `-i`, and labels are -100 outside
            the answer.

        Raises:
            ValueError: if a field is missing or unknown, or the answer has no tokens.
        """
        return Template.parse(self.template).encode(tokenizer, answer=answer, **fields)

    def encode_pair(self, tokenizer: Any, *, answer: str | None = None, **fields: str) -> dict[str, list[int]]:
        """Encode one example for an encoder-decoder as token ids: the encoder's input, following the template without
        its `[Y]`, and the decoder's labels.

        Args:
            tokenizer: a transformers tokenizer; both sides get its special tokens.
            answer: the target text; None for a prompt without an answer, as in generation.
            fields: the text of each field of the template.

        Returns:
            `{"input_ids", "labels"}`, lists that may differ in length, without labels if there is no answer. Soft token
            `[Pi]` has id `-i`.

        Raises:
            ValueError: if a field is missing or unknown, or the answer has no tokens.
        """
        read = Template.parse(self.template).encode(tokenizer, **fields)["input_ids"]
        pair = {"input_ids": read + end_ids(tokenizer)}
        if answer is not None:
            if not tokenizer(answer, add_special_tokens=False)["input_ids"]:
                raise ValueError(
                    f"the answer {answer!r} holds no token: give a text, or answer=None for a prompt alone"
                )
            pair["labels"] = tokenizer(text_target=answer)["input_ids"]
        return pair


class SoftPrompt(nn.Module):
    """The learned parameters of a method, in fp32, and their contribution to a forward pass.

    Attributes:
        config: the method that built it, with its `length` resolved.
        placement: where `soft_tokens` go: "before" or "after" a row's prompt, "inline" at negative ids, or None if the
            method has none.
        encodes_rows: whether `row_prefix` computes the K/V of each block from the hidden states that enter it.
    """

    placement: Placement | None = None
    encodes_rows: bool = False

    def __init__(self, config: Method) -> None:
        super().__init__()
        self.config = config

    def soft_tokens(self) -> Tensor | None:
        """Soft embeddings `[k, embedding_size]`."""
        return None

    def prefix(self) -> Prefix | None:
        """The learned prefix of all rows (A = 1)."""
        return None

    def row_prefix(self, layer: int, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """K `[R, G, n, D]` and V `[R, G, n, Dv]` of block `layer` from the prompt's hidden states `[R, M, C]`, of which
        row r has `lengths[r]` (the rest is padding and must not affect the result), in their dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not encode rows")

    def learning_rates(self) -> dict[str, float]:
        """The recommended peak learning rate of each learned parameter by name, used by `learning_rate="auto"`."""
        return {name: NETWORK_RATE for name, _ in self.named_parameters()}

    @property
    def foldable(self) -> bool:
        """Whether `folded` returns a different module."""
        return type(self).folded is not SoftPrompt.folded

    def folded(self) -> SoftPrompt:
        """The module to keep after training: reparametrisations are replaced by their output, without the networks."""
        return self


@torch.no_grad()
def size_of(values: Tensor) -> float:
    """The root mean square of values, of all shards."""
    return whole(values).float().square().mean().sqrt().item()


class SoftTokens(SoftPrompt):
    """Plain soft embeddings `[k, embedding_size]`."""

    def __init__(self, config: Method, embeddings: Tensor, placement: Placement) -> None:
        super().__init__(config)
        self.placement = placement
        self.embeddings = nn.Parameter(embeddings.detach().to(torch.float32, copy=True).contiguous())

    def soft_tokens(self) -> Tensor:
        return self.embeddings

    def learning_rates(self) -> dict[str, float]:
        return {"embeddings": TOKEN_RATE * size_of(self.embeddings)}


def matrices_by_name(k: Layers, v: Layers) -> dict[str, Tensor]:
    """K and V of layers by the names that `SoftMatrices` gives them."""
    found: dict[str, Tensor] = {}
    for name, of in (("k", k), ("v", v)):
        found |= {name: of} if isinstance(of, Tensor) else {f"{name}_{layer}": each for layer, each in enumerate(of)}
    return found


class SoftMatrices(SoftPrompt):
    """Plain matrices, what a `Prefix` holds, without a copy: k `[L or 1, 1, G, n, D]` and v `[L or 1, 1, G, n, Dv]`.
    Where layers differ, k_0, k_1, …, v_0, v_1, … of one layer each, `[1, G, n, D]` and `[1, G, n, Dv]`."""

    def __init__(self, config: Method, k: Layers, v: Layers, *, window_covers: bool) -> None:
        super().__init__(config)
        for name, x in matrices_by_name(k, v).items():
            # A storage each: checkpoints keep one of two parameters that share one.
            self.register_parameter(name, nn.Parameter(x.detach().to(torch.float32, copy=True).contiguous()))
        self.window_covers = window_covers

    def prefix(self) -> Prefix:
        return Prefix(self._layers("k"), self._layers("v"), window_covers=self.window_covers)

    def _layers(self, name: str) -> Layers:
        held = {each: x for each, x in self._parameters.items() if each.startswith(name) and x is not None}
        return held[name] if name in held else tuple(held.values())

    def learning_rates(self) -> dict[str, float]:
        k = self._layers("k")
        shared = isinstance(k, Tensor) and len(k) == 1
        key, value = (SHARED_KEY_RATE, SHARED_VALUE_RATE) if shared else (KEY_RATE, VALUE_RATE)
        return {name: key if name.startswith("k") else value for name in self._parameters}


class Computed(SoftPrompt):
    """A soft prompt that a network computes at every call, because detecting changed weights is not cheap."""

    def compute(self) -> Tensor:
        """Run the network, in fp32."""
        raise NotImplementedError

    def computed(self) -> Tensor:
        """The result of `compute`, outside autocast."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.compute()
