"""Rows with different soft prompts in one batch, combined into one table of soft tokens and one bank of prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.hf.context import LayerKV, SoftContext
from softkv.hf.tensor_parallel import TensorParallel
from softkv.methods.base import SoftPrompt
from softkv.prefix import Prefix

Names = tuple[str | None, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class SoftRows:
    """Which soft prompt each row of a batch has.

    Attributes:
        names: the adapter of each row, None for the bare model; a single name applies to all rows.
        softs: these soft prompts, in the order of their first rows.
        order: the index in `names` of each row, if a cache's rows were reordered or selected.
        encodes: whether K and V of some rows are computed inside the attention blocks. (A field, because compiled code
            would guard on the names read by a property.)
    """

    names: Names
    softs: dict[str, SoftPrompt]
    order: tuple[int, ...] | None = None
    encodes: bool = False

    @classmethod
    def of(cls, names: Sequence[str | None], adapters: nn.ModuleDict, order: Sequence[int] | None = None) -> SoftRows:
        """The soft prompts of these names.

        Raises:
            ValueError: for a name that is not in `adapters`.
        """
        different = dict.fromkeys(names)
        for name in different:
            if name is not None:
                check_known(name, adapters)
        softs = {name: cast(SoftPrompt, adapters[name]) for name in different if name is not None}
        encodes = any(soft.encodes_rows for soft in softs.values())
        if len(different) == 1:
            return cls(tuple(different), softs, None, encodes)
        return cls(tuple(names), softs, None if order is None else tuple(order), encodes)

    @property
    def alone(self) -> SoftPrompt | None:
        """The soft prompt of every row, if all have the same one."""
        return next(iter(self.softs.values())) if len(self.names) == 1 and self.softs else None

    @property
    def inline(self) -> bool:
        """Whether rows contain all soft tokens by id."""
        return all(soft.placement == "inline" for soft in self.softs.values())

    @property
    def leads(self) -> bool:
        """Whether some rows have soft tokens in front."""
        return any(soft.placement == "before" for soft in self.softs.values())

    @property
    def reading_prompts(self) -> str:
        """The methods that must know where a row's prompt ends; "" if there are none."""
        softs = (soft for soft in self.softs.values() if soft.placement == "after" or soft.encodes_rows)
        return " and ".join(dict.fromkeys(type(soft.config).__name__ for soft in softs))

    def of_rows(self, rows: int, values: Mapping[str, T], default: T) -> list[T]:
        """The value of each of `rows` rows, by the name of its adapter. Beams and returned sequences of one row are
        adjacent."""
        found = self._ordered([default if name is None else values.get(name, default) for name in self.names])
        return [value for value in found for _ in range(rows // len(found))]

    def names_of(self, rows: int) -> list[str | None]:
        """The adapter of each of `rows` rows."""
        return self.of_rows(rows, {name: name for name in self.softs}, None)

    def _ordered(self, of_names: list[T]) -> list[T]:
        return of_names if self.order is None else [of_names[at] for at in self.order]

    def tokens(self, rows: int, *, heads: bool) -> RowTokens | None:
        """The soft tokens of `rows` rows, or None if there are none.

        Args:
            heads: whether soft tokens in front are part of the rows.
        """
        holders = {
            name: soft
            for name, soft in self.softs.items()
            if soft.placement is not None and (soft.placement != "before" or heads)
        }
        if not holders:
            return None
        first, block, count = {}, {}, 0
        for name, soft in holders.items():
            first[name] = count
            block[name] = 0 if soft.placement == "inline" else _slots(soft)
            count += _slots(soft)
        head = {name: soft.placement == "before" for name, soft in self.softs.items()}
        return RowTokens(
            tuple(holders.values()),
            self.of_rows(rows, first, 0),
            self.of_rows(rows, block, 0),
            self.of_rows(rows, head, False),
        )

    @property
    def encoded(self) -> dict[str, list[int]]:
        """The rows of each encoder, if rows have different soft prompts."""
        return {
            encoder: [row for row, name in enumerate(self.names) if name == encoder]
            for encoder, soft in self.softs.items()
            if soft.encodes_rows
        }

    def context(
        self,
        prefixes: Mapping[str, Prefix],
        layers: int,
        device: torch.device,
        heads: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> SoftContext:
        """The bank of prefixes that the rows read; encoders append the prefixes of their rows to it.

        Args:
            prefixes: of the soft prompts that have one.
            layers: the number of attention blocks.
            device: of the model.
            heads: `[P, C]`, of those in front of rows without a prefix, which the pass itself computes.

        Raises:
            ValueError: for a soft prompt with several prefixes, in a batch with others.
        """
        if self.alone is not None:
            if self.encodes:
                return SoftContext(slots=_slots(self.alone))
            if heads:
                (head,) = heads.values()
                return SoftContext(window_covers=True, slots=len(head), heads=head[None])
            if not prefixes:
                return SoftContext()
            (prefix,) = prefixes.values()
            shared = prefix.length if prefix.lengths is None else prefix.lengths
            return SoftContext(_by_layer(prefix, layers), prefix.lengths, None, prefix.window_covers, shared)

        number: dict[str, int] = {}
        lengths: list[int] = []
        covers: list[bool] = []
        for name, prefix in prefixes.items():
            if prefix.count != 1 or prefix.lengths is not None:
                raise ValueError(
                    f"adapter {name!r} has {prefix.count} prefixes, expected one if rows have different adapters"
                )
            number[name] = len(lengths)
            lengths.append(prefix.length)
            covers.append(prefix.window_covers)
        for name, head in heads.items():
            number[name] = len(lengths)
            lengths.append(len(head))
            covers.append(True)
        index = [-1 if name is None else number.get(name, -1) for name in self.names]
        for name, rows in self.encoded.items():
            for row in rows:
                index[row] = len(lengths)
                lengths.append(_slots(self.softs[name]))
                covers.append(False)
        if not lengths:
            return SoftContext()

        index = self._ordered(index)
        slots = [0 if at < 0 else lengths[at] for at in index]
        alike = len(set(covers)) == 1
        # The op needs no index for one prefix per row in order.
        in_order = alike and not self.encodes and index == list(range(len(lengths)))
        return SoftContext(
            _by_layer(bank(list(prefixes.values())), layers) if prefixes else None,
            None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device),
            None if in_order else torch.tensor(index, device=device),
            covers[0] if alike else torch.tensor(covers, device=device),
            slots[0] if len(set(slots)) == 1 else torch.tensor(slots, device=device),
            heads=of_one_length(heads.values()) if heads else None,
        )

    def encode(
        self, bank: LayerKV | None, block: int, hidden: Tensor, lengths: Tensor, parallel: TensorParallel | None
    ) -> LayerKV:
        """K `[A, G, P, D]` and V `[A, G, P, Dv]` of one attention block: its bank, followed by what encoders compute
        from their rows.

        Args:
            bank: of the rows without an encoder.
            block: the number of the attention block.
            hidden: `[B, M, C]`, the block's input at the prompts. Only the first of the rows that share a prompt is
                read.
            lengths: `[B]`.
            parallel: the processes over which the base is split.
        """

        def encoded(soft: SoftPrompt, hidden: Tensor, lengths: Tensor) -> LayerKV:
            kv = soft.row_prefix(block, hidden, lengths)
            return kv if parallel is None else parallel.own_of_layer(kv)

        if self.alone is not None:
            return encoded(self.alone, hidden, lengths)
        parts, repeats = [] if bank is None else [bank], len(hidden) // len(self.names)
        for name, rows in self.encoded.items():
            at = torch.tensor(rows, device=hidden.device) * repeats
            parts.append(encoded(self.softs[name], hidden[at], lengths[at]))
        keys, values = zip(*parts, strict=True)
        return _end_to_end(keys), _end_to_end(values)


@dataclass(frozen=True)
class RowTokens:
    """The soft tokens in the rows of a batch.

    Attributes:
        softs: the soft prompts that have some.
        first: the index in the table of each row's first soft token.
        block: the length of each row's block (0: none, or a template's tokens, which are placed individually).
        heads: whether each row's block is before it rather than after its prompt.
    """

    softs: tuple[SoftPrompt, ...]
    first: list[int]
    block: list[int]
    heads: list[bool]
    _computed: list[Tensor] = field(default_factory=list)

    @property
    def table(self) -> Tensor:
        """`[K, C]`: the soft tokens of all the soft prompts, computed on first use."""
        if not self._computed:  # not functools.cached_property, whose lock a tracer can't enter
            tables = [cast(Tensor, soft.soft_tokens()) for soft in self.softs]
            self._computed.append(tables[0] if len(tables) == 1 else torch.cat(tables))
        return self._computed[0]

    @property
    def longest(self) -> int:
        """The number of columns for blocks in a padded batch."""
        return max(self.block)

    @property
    def ragged(self) -> bool:
        return min(self.block) < self.longest

    def place(self, first: Tensor, split: Tensor | None) -> Tensor:
        """`[R]`: the flat token before which each row's block is inserted: its first, or the one after its prompt."""
        return first if split is None else torch.where(torch.tensor(self.heads, device=first.device), first, split)

    def blocks(self, device: torch.device, *, heads: bool) -> Tensor:
        """`[R, k]`: the indices in the table of each row's block before it, or after its prompt; -1 past its end."""
        block = [k if head == heads else 0 for k, head in zip(self.block, self.heads, strict=True)]
        first, lengths = (torch.tensor(x, device=device)[:, None] for x in (self.first, block))
        at = torch.arange(max(block), device=device)
        return torch.where(at < lengths, first + at, -1)

    def in_table(self, ids: Tensor, lines: Tensor | None = None) -> Tensor:
        """Ids `[B, T]` with negative ids converted from -i for a row's i-th soft token to indices in the table.

        Args:
            lines: `[B, T]`, the row of each token; None: its row in the batch.
        """
        if not any(self.first):
            return ids
        first = torch.tensor(self.first, device=ids.device)
        return torch.where(ids < 0, ids - (first[:, None] if lines is None else first[lines]), ids)


def bank(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes of any lengths end to end in one; what lies past the length of each is 0."""
    layers = max(len(prefix.k) for prefix in prefixes)
    if all(isinstance(of, Tensor) for prefix in prefixes for of in (prefix.k, prefix.v)):
        k, v = (
            _end_to_end([cast(Tensor, each).expand(layers, -1, -1, -1, -1) for each in of])
            for of in ([prefix.k for prefix in prefixes], [prefix.v for prefix in prefixes])
        )
        return Prefix(k, v)
    of_layers = zip(*(prefix.layers(layers) for prefix in prefixes), strict=True)
    keys, values = zip(*(map(_end_to_end, zip(*of_layer, strict=True)) for of_layer in of_layers), strict=True)
    return Prefix(keys, values)


def check_known(name: str, adapters: nn.ModuleDict) -> None:
    """Raise unless there is an adapter with this name."""
    if name not in adapters:
        raise ValueError(f"this model has no adapter {name!r:.300}: expected one of {', '.join(map(repr, adapters))}")


def of_one_length(heads: Iterable[Tensor]) -> Tensor:
    """Stack heads `[P, C]` to `[A, P, C]`: shorter ones are padded with their last token, which is never read."""
    given = list(heads)
    if len(given) == 1:
        return given[0][None]
    at = torch.arange(max(map(len, given)), device=given[0].device)
    return torch.stack([head[at.clamp(max=len(head) - 1)] for head in given])


def behind(bank: LayerKV, heads: LayerKV) -> LayerKV:
    """The K and V of a block: learned prefixes, followed by heads."""
    k, v = (_end_to_end((x.to(head.device, head.dtype), head)) for x, head in zip(bank, heads, strict=True))
    return k, v


def _end_to_end(of: Sequence[Tensor]) -> Tensor:
    """Stack `[..., A, G, P, D or Dv]` with different A and P."""
    if len(of) == 1:
        return of[0]
    longest = max(x.shape[-2] for x in of)
    return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[-2])) if x.shape[-2] < longest else x for x in of], -4)


def _by_layer(prefix: Prefix, layers: int) -> dict[int, LayerKV]:
    return dict(enumerate(prefix.layers(layers)))


def _slots(soft: SoftPrompt) -> int:
    return int(soft.config.length)  # type: ignore[attr-defined]
