"""Position ids: each row counts from its first real token, after its prefix."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softkv.hf.context import SoftContext
from softkv.hf.layout import packed_positions, token_positions
from softkv.hf.masks import padding_mask
from softkv.hf.model_call import ModelCall

PAST_LENGTH = "past_key_values_length"  # the argument of some position tables for the number of preceding tokens


@dataclass
class Positions:
    """The positions of a base's tokens.

    Attributes:
        base: the frozen model.
        table: the number of positions in a learned table; None if they are computed.
        follow_length: whether rotations depend on the length of a pass.
        first: the position of a row's first token.
        columns: the largest number of columns, including slots, up to which the base ignores in which column a token
            is; None for any number. (Llama 4 scales the queries of later columns in its layers without rotation.)
        counting_table: the position table of a decoder that takes no position ids but counts columns (BART), or None.
    """

    base: Any
    table: int | None
    follow_length: bool
    first: int = 0
    columns: int | None = None
    counting_table: nn.Embedding | None = None

    @classmethod
    def of_decoder(cls, base: Any, decoder: nn.Module) -> Positions:
        config = base.config.get_text_config()
        size, follow = table_size(learned_positions(decoder)), rotations_follow_length(config)
        counting = None if takes_position_ids(decoder) else position_table(decoder)
        if not isinstance(counting, nn.Embedding) or not takes_position_ids(counting):
            counting = None
        return cls(base, size, follow, columns=_columns_alike(config), counting_table=counting)

    def looked_up(self, positions: Tensor) -> Tensor:
        """The embeddings `[B, T, C]` that `counting_table` holds for positions `[B, T]`."""
        assert self.counting_table is not None
        return nn.Embedding.forward(self.counting_table, positions + int(getattr(self.counting_table, "offset", 0)))

    def of(self, call: ModelCall, context: SoftContext, kwargs: dict[str, Any]) -> Tensor:
        """Position ids of a forward: each row counts from its first real token, after its prefix."""
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        B, T = tokens.shape[:2]
        cache, positions, rows = kwargs.get("past_key_values"), kwargs.get("position_ids"), context.rows
        past = cache.get_seq_length() if cache is not None else 0
        mask, given = padding_mask(kwargs.get("attention_mask")), call.positions_given
        if positions is None:
            positions = token_positions(mask, (B, T), past, tokens.device)
        elif rows is not None and self.first:  # restarting positions only mark where rows begin
            positions, given = packed_positions(rows, T), False
        elif not given and call.prompts is None and mask is not None and positions.shape == (1, T):
            # A wrapper around the decoder has counted columns, including padding.
            counted = token_positions(mask, (B, T), past, tokens.device) + (positions[:, :1] - past)
            positions = torch.where((positions.diff() == 1).all(), counted, positions)
        slots = context.slots_of(B if rows is None else len(rows.cu_seqlens) - 1)
        if isinstance(slots, Tensor):
            slots = slots[:, None] if rows is None else slots.repeat_interleave(rows.cu_seqlens.diff(), output_size=T)
        if self.columns is not None and not torch.compiler.is_compiling():
            self._check_columns(past + T, slots)
        positions = positions + slots if given else positions + (self.first + slots)
        if self.table is not None and not torch.compiler.is_compiling():
            # The number of columns bounds positions without reading them from the device.
            longest = past + T if rows is None else rows.longest
            bounded = not call.positions_given and isinstance(slots, int) and isinstance(longest, int)
            if not bounded or longest + slots + self.first > self.table:
                self.check(int(positions.max()))
        elif self.base.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_made_for(past + T if rows is None else rows.longest, slots, positions)
        return positions

    def _check_made_for(self, longest: int, slots: int | Tensor, positions: Tensor) -> None:
        """Raise if computed positions exceed those that the model supports, which training would silently use."""
        made_for = computed_positions(self.base.config.get_text_config())
        most = slots if isinstance(slots, int) else int(slots.max())
        if made_for is None or longest + most <= made_for or int(positions.max()) < made_for:
            return
        raise ValueError(
            f"prefix and tokens need {int(positions.max()) + 1} positions, the model was made for {made_for} "
            f"(max_position_embeddings): cut rows to {made_for - most} tokens, with max_length={made_for - most} of "
            "softkv.Trainer"
        )

    def _check_columns(self, width: int, slots: int | Tensor) -> None:
        """Raise if the base would treat tokens differently by their columns in the batch."""
        most = int(slots.max()) if isinstance(slots, Tensor) else slots
        if self.columns is not None and width + most > self.columns:
            raise ValueError(
                f"{type(self.base).__name__} scales queries by their columns, including padding: expected "
                f"slots and columns of up to {self.columns}, where all are alike, got {width + most}"
            )

    def check(self, last: int) -> None:
        """Raise if a position is past the end of a learned table."""
        if self.table is not None and last >= self.table:
            raise ValueError(
                f"prefix and tokens need positions up to {last}, but the model's learned position table ends at "
                f"{self.table - 1}: use a shorter prefix or shorter rows"
            )


def computed_positions(config: Any) -> int | None:
    """The number of positions supported by a model that computes them; None if its config does not state it."""
    made_for = getattr(config, "max_position_embeddings", None)
    if not isinstance(made_for, int) or made_for < 1:
        return None
    stretched = [each.get("factor") or 1.0 for each in _rotations(config) if each["rope_type"] in ("linear", "dynamic")]
    return int(made_for * max(stretched, default=1.0))


def _columns_alike(config: Any) -> int | None:
    """The number of columns up to which a model scales all queries equally; None if it does not scale by columns."""
    if not getattr(config, "attn_temperature_tuning", False) or all(getattr(config, "no_rope_layers", None) or [1]):
        return None
    return int(config.floor_scale) - 1


def rotations_follow_length(config: Any) -> bool:
    """Whether the rotation angles of keys depend on the length of a pass, so that the keys of a head run alone differ
    from those of the same tokens in front of a row."""
    return any(each["rope_type"] in ("dynamic", "longrope") for each in _rotations(config))


def _rotations(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each]


def position_table(stack: nn.Module) -> nn.Module | None:
    """The module that computes position embeddings, if it takes the number of preceding tokens."""
    found = getattr(stack, "embed_positions", None)
    return (
        found if isinstance(found, nn.Module) and PAST_LENGTH in inspect.signature(found.forward).parameters else None
    )


def table_size(table: nn.Module | None) -> int | None:
    """The number of positions in a table; None if it is computed on demand."""
    return table.num_embeddings - int(getattr(table, "offset", 0)) if isinstance(table, nn.Embedding) else None


def takes_position_ids(stack: nn.Module) -> bool:
    """Whether the forward of a stack, or of a table, has an argument `position_ids`."""
    return "position_ids" in inspect.signature(stack.forward).parameters


def learned_positions(decoder: nn.Module) -> nn.Embedding | None:
    """The learned table of positions, or None for models that compute them."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in (
            "wpe",
            "embed_positions",
            "position_embeddings",
        ):
            return module
    return None
