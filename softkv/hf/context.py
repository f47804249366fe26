"""State of a forward pass, passed through the frozen model as the keyword `softkv_prefix=`.

It is not a tensor, because beam search repeats every tensor keyword, and not an attribute of modules, because gradient
checkpointing re-runs forwards later, and two forwards may precede one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from softkv.hf.generation.prefill import PackedPrefill
    from softkv.hf.heads import PackedHeads
    from softkv.hf.repeat import CallCache, PassCalls

LayerKV = tuple[Tensor, Tensor]


class BlockInputs(NamedTuple):
    """The inputs of the attention function in one block."""

    block: nn.Module
    key: Tensor  # [B, G, S, D]
    value: Tensor  # [B, G, S, Dv]
    window: int | None
    causal: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """(G, D, Dv)"""
        return self.key.shape[1], self.key.shape[3], self.value.shape[3]


def layers_read(blocks: Sequence[BlockInputs]) -> tuple[int, ...]:
    """The number of the block whose keys and values each block reads; empty if every block has its own."""
    first = {id(each.key): number for number, each in reversed(list(enumerate(blocks)))}
    return tuple(first[id(each.key)] for each in blocks) if len(first) < len(blocks) else ()


class BlockOrder:
    """The attention blocks of a model, numbered in the order in which it runs them.

    A module that runs several times per forward pass (in ALBERT) counts as a separate block each time.
    """

    def __init__(self, blocks: Sequence[nn.Module] = ()) -> None:
        self.blocks = list(blocks)
        self._numbers: dict[nn.Module, list[int]] = {}
        for number, block in enumerate(blocks):
            self._numbers.setdefault(block, []).append(number)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def modules(self) -> list[nn.Module]:
        return list(self._numbers)

    @property
    def repeats(self) -> bool:
        """Whether any module runs several times."""
        return len(self._numbers) < len(self.blocks)

    def number(self, module: nn.Module, turns: dict[nn.Module, int] | None = None) -> int:
        """The number of the block that starts to run; for a module that runs several times, the next one according to
        the counts in `turns`."""
        numbers = self._numbers[module]
        if len(numbers) == 1 or turns is None:
            return numbers[0]
        turn = turns[module] = turns.get(module, -1) + 1
        return numbers[turn % len(numbers)]


@dataclass(frozen=True)
class PackedRows:
    """Packed rows: row r consists of tokens `cu_seqlens[r]` to `cu_seqlens[r + 1]`."""

    cu_seqlens: Tensor  # int32 [rows + 1]
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> PackedRows:
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        return cls(cu_seqlens, int(lengths.max()))


@dataclass(frozen=True)
class RowPrompts:
    """The position of each row's prompt among the B·T hidden states of a batch."""

    index: Tensor  # [R, M] into the flattened [B·T], arbitrary past a row's length
    lengths: Tensor  # [R]


@dataclass(frozen=True)
class RowEncoder:
    """Computes the K/V of each attention block from the prompt's hidden states that enter it."""

    encode: Callable[[int, Tensor, Tensor], LayerKV]
    prompts: RowPrompts | None
    memory: dict[int, LayerKV] | None  # filled at prefill, read when decoding

    def __call__(self, layer: int, hidden: Tensor) -> LayerKV:
        """K `[A, G, P, D]`, V `[A, G, P, Dv]` of block `layer` from its input `[B, T, C]`."""
        if self.memory is not None and layer in self.memory:
            return self.memory[layer]
        assert self.prompts is not None
        prompt = hidden.flatten(0, 1)[self.prompts.index]  # [R, M, C]
        kv = self.encode(layer, prompt, self.prompts.lengths)
        if self.memory is not None:
            self.memory[layer] = kv
        return kv


@dataclass(frozen=True)
class SoftContext:
    """The prefixes and the row layout of a forward pass.

    Attributes:
        layers: K `[A, G, P, D]`, V `[A, G, P, Dv]` of attention blocks, by their numbers in `order`, or None.
        lengths: `[A]`, the number of slots in use of each prefix, or None.
        index: `[B]`, the prefix of each row (-1: none), or None.
        window_covers: whether sliding windows count the slots, for all prefixes or for each, `[A]` (with an index).
        slots: P of each row: one number, or `[B]`.
        rows: the packed rows of a batch of one line, or None.
        restarts: `[1, T]`, position ids that may restart, where a tracer can't tell packed rows by them; or None.
        unpadded: the padding removed from the rows, restored in the output.
        heads: `[A, P, C]`, soft tokens in front of rows that run in the same pass: their K and V in each block follow
            those of `layers` in the bank.
        line: the packed sequence of heads and rows that this pass runs, once it exists.
        encoder: computes K, V per row inside each attention block (encoder-mode P-tuning v2).
        order: numbers the attention blocks; None if no block needs a number.
        turns: how often each module that runs several times per pass has started, in this pass.
        capture: collects the inputs of each attention block, in the order in which they run.
        masses: collects the attention that prefixes take in each block (`softkv.hf.attention_mass`), or None.
        kept_calls: validated calls of attention that other blocks may reuse (`softkv.hf.repeat`); None: every block is
            validated.
        steps: of a cache, the function that each block runs in a decoding step, by block number.
        bias: returns the position biases of the slots, `[1, H, T, P]`, for a block, T, the number of tokens before the
            queries, and P; None if slots have none.
        cross: in the decoder of an encoder-decoder, the context of its cross-attention.
    """

    layers: dict[int, LayerKV] | None = None
    lengths: Tensor | None = None
    index: Tensor | None = None
    window_covers: bool | Tensor = False
    slots: int | Tensor = 0
    rows: PackedRows | None = None
    restarts: Tensor | None = None
    unpadded: PackedPrefill | None = None
    heads: Tensor | None = None
    line: PackedHeads | None = None
    encoder: RowEncoder | None = None
    backend: str | None = None
    order: BlockOrder | None = None
    turns: dict[nn.Module, int] = field(default_factory=dict)
    capture: list[BlockInputs] | None = None
    masses: dict[int, Tensor] | None = None
    kept_calls: PassCalls | CallCache | None = None
    steps: dict[int, Any] | None = None
    bias: Callable[[nn.Module, int, int | Tensor, int], Tensor | None] | None = None
    cross: SoftContext | None = None

    def of_layer(self, layer: int, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """The prefix keywords of the attention op for one block and `rows` rows, except `window_covers_prefix`. Blocks
        may be on different devices."""
        if self.layers is None:
            return {}
        k, v = self.layers[layer]
        index = self.index_of(rows)
        return {
            "prefix_k": k.to(device, dtype),
            "prefix_v": v.to(device, dtype),
            "prefix_lengths": None if self.lengths is None else self.lengths.to(device),
            "prefix_index": None if index is None else index.to(device),
        }

    def index_of(self, rows: int) -> Tensor | None:
        """`[rows]`: the prefix of each row, if the op can't infer it from the number of prefixes. Beams and returned
        sequences of one row are adjacent."""
        assert self.layers is not None
        index, k = self.index, next(iter(self.layers.values()))[0]
        if index is None:
            if len(k) == 1 or len(k) == rows:
                return None
            index = torch.arange(len(k), device=k.device)
        return _repeated(index, rows)

    def slots_of(self, rows: int) -> int | Tensor:
        """P of each of `rows` rows: an int, or `[rows]`."""
        return self.slots if isinstance(self.slots, int) else _repeated(self.slots, rows)


def _repeated(of_rows: Tensor, rows: int) -> Tensor:
    return of_rows if len(of_rows) == rows else of_rows.repeat_interleave(rows // len(of_rows), output_size=rows)
