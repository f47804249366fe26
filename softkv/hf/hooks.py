"""How calls of a `SoftModel` reach the inside of the frozen decoder: keyword pre-hooks on the decoder and, in encoder
mode, on its attention blocks."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.hf.context import BlockOrder, Captured, LayerKV, RowEncoder, RowPrompts, SoftContext
from softkv.hf.frozen import decoder_of
from softkv.hf.generation.cache_state import Filled
from softkv.hf.generation.prefill import Unpadded
from softkv.hf.generation.prompts import Prompts
from softkv.hf.layout import Lines, token_positions
from softkv.hf.prefixes import SoftRows
from softkv.prefix import evaluating


@dataclass
class Call:
    """One `forward` or `generate` under way, as the pre-hooks see it.

    Attributes:
        context: what goes to the attention blocks.
        soft: the soft prompts of its rows; None in a run of the bare decoder.
        prompts: of a `generate`.
        soft_tokens: `[K, C]`, of a `generate` whose prompts hold soft tokens.
        positions_given: whether position ids are the user's own.
    """

    context: SoftContext
    soft: SoftRows | None = None
    prompts: Prompts | None = None
    soft_tokens: Tensor | None = None
    positions_given: bool = False


class _Calls(threading.local):
    """The calls under way in this thread, outermost first. Copies begin empty."""

    def __init__(self) -> None:
        self.stack: list[Call] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Calls, ()


class DecoderHooks:
    """The pre-hooks of one `SoftModel` on its base's decoder.

    Attributes:
        base: the frozen model.
        order: its attention blocks; known after `probe`.
        calls: the calls under way.
    """

    def __init__(self, base: Any, backend: str | None) -> None:
        self.base, self.backend = base, backend
        self.order = BlockOrder()
        self.calls = _Calls()
        self._reads_blocks = False
        self._offset = 0
        table = _learned_positions(self.decoder)
        self._table = None if table is None else table.num_embeddings - int(getattr(table, "offset", 0))
        self._handles = [
            self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
        ]

    @property
    def decoder(self) -> nn.Module:
        return cast(nn.Module, decoder_of(self.base))

    @property
    def _all_attention(self) -> bool:
        """Whether only attention looks at other tokens: states and convolutions would run from row to row."""
        return len(self.order) == self.base.config.get_text_config().num_hidden_layers

    def hook_blocks(self) -> None:
        """Has encoders read what enters the attention modules."""
        if self._reads_blocks:
            return
        if self.order.repeats:
            raise ValueError(
                f"{type(self.base).__name__} runs an attention module several times a pass, where an encoder of "
                "prompts can't tell the times apart: leave the encoder out"
            )
        self._reads_blocks = True
        self._handles += [
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True) for block in self.order.modules
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def active(self, call: Call) -> Iterator[None]:
        if not self._handles:
            raise RuntimeError("this soft prompt was detached from its model: attach it again")
        self.calls.stack.append(call)
        try:
            yield
        finally:
            self.calls.stack.pop()

    def capture(self, **inputs: Tensor) -> list[Captured]:
        """What reaches the attention blocks in a forward pass of the bare decoder."""
        context = SoftContext(backend=self.backend, capture=[])
        with self.active(Call(context)):
            self.decoder(**inputs, use_cache=False)
        assert context.capture is not None
        return context.capture

    def probe(self) -> list[Captured]:
        """Runs one token through the decoder to see its attention blocks."""
        name = type(self.base).__name__
        try:
            with torch.no_grad(), evaluating(self.base):
                blocks = self.capture(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.base.device))
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise
            blocks = []
        if not blocks:
            raise ValueError(
                f"{name} does not pass keywords through to transformers' attention interface, so softkv can't reach "
                "its attention"
            )
        self._check_positions_are_taken(name)
        self._offset = self._first_position()
        self.order = BlockOrder([captured.block for captured in blocks])
        return blocks

    def _check_positions_are_taken(self, name: str) -> None:
        """Tokens stand behind a prefix by their position ids: a decoder must take them."""
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            raise ValueError(f"{name} takes no position_ids, so softkv can't place its tokens behind a prefix")

    def _first_position(self) -> int:
        """The position id of a row's first token: RoBERTa's stands past its table's row for padding."""
        table = _learned_positions(self.decoder)
        if table is None or table.padding_idx is None:
            return 0
        read: list[int] = []
        token = int(self.base.config.get_text_config().pad_token_id == 0)  # any but padding
        ids = torch.full((1, 1), token, device=self.base.device)
        note = table.register_forward_pre_hook(lambda _, args: read.append(int(args[0].flatten()[0])))
        try:
            with torch.no_grad(), evaluating(self.base):
                self.decoder(input_ids=ids)
                self.decoder(input_ids=ids, position_ids=torch.zeros_like(ids))
        finally:
            note.remove()
        return read[0] - read[1] if len(read) == 2 else 0

    def embed(self, ids: Tensor, soft_tokens: Tensor) -> Tensor:
        """Embeddings `[B, T, C]` of ids, with soft token -i-1 where an id i is negative."""
        embeds = self.base.get_input_embeddings()(ids.clamp(min=0))
        soft = soft_tokens.to(embeds.dtype)[(-ids - 1).clamp(min=0)]
        return torch.where((ids < 0)[:, :, None], soft, embeds)

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keyword pre-hook of the decoder: soft embeddings, positions behind the prefix, and the prefix."""
        if not self.calls.stack:
            return None
        call = self.calls.stack[-1]
        if args:
            kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        context = call.context
        if call.prompts is not None:
            context = self._enter_generation(call, call.prompts, kwargs)
        if context.capture is None:
            kwargs["position_ids"] = self._positions(call, context, kwargs)
            if call.prompts is not None and context.encoder is None and self._all_attention:
                context = self._without_padding(context, kwargs)
        kwargs["softkv_prefix"] = replace(context, order=self.order, turns={}) if len(self.order) else context
        return (), kwargs

    def _without_padding(self, context: SoftContext, kwargs: dict[str, Any]) -> SoftContext:
        """Padded prompts in one line, where that can be undone."""
        unpadded = Unpadded.of(kwargs)
        if unpadded is None:
            return context
        unpadded.pack(kwargs)
        return replace(context, rows=unpadded.rows(), unpadded=unpadded)

    def _leave_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the decoder: what was packed on the way in gets its padding back."""
        context = kwargs.get("softkv_prefix")
        if not self.calls.stack or not isinstance(context, SoftContext) or context.unpadded is None:
            return None  # nothing was packed, or it was by another soft model on this base
        return context.unpadded.unpack(output, kwargs.get("past_key_values"))

    def _enter_generation(self, call: Call, prompts: Prompts, kwargs: dict[str, Any]) -> SoftContext:
        """A forward inside `generate`: soft embeddings where the prompt has them, and the encoder of its rows."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        B, T = tokens.shape[:2]
        prompt = prompts.ids if prompts.embeds is None else prompts.embeds
        assert prompt is not None
        assert call.soft is not None
        width, filled = prompt.shape[1], Filled.of(cache)
        if filled is None:
            filled = Filled(prompts.columns, B, call.soft.names, prompts.mask_for(B), unread=width)
            if cache is not None:
                filled.leave_with(cache)
        unread, filled.unread = filled.unread, max(filled.unread - T, 0)
        if ids is not None and prompts.soft_at is not None and unread:
            assert call.soft_tokens is not None
            at = prompts.soft_at[:, -unread:][:, :T]
            at = F.pad(at, (0, T - at.shape[1]), value=-1).repeat_interleave(B // len(at), 0)
            ids = torch.where(at < 0, ids, -at - 1)
            kwargs["inputs_embeds"], kwargs["input_ids"] = self.embed(ids, call.soft_tokens), None
        if not call.soft.encodes:
            return call.context
        rows = None
        if not filled.kv:
            if width > T:
                raise ValueError(
                    f"encoder-mode P-tuning v2 reads whole prompts at once: expected {width} columns in the first "
                    f"forward of a cache, got {T} (leave prefill_chunk_size out)"
                )
            mask = prompts.mask_for(B)
            if mask is None:
                mask = torch.ones(B, width, device=prompt.device)
            lines = Lines.of((B, T), F.pad(mask, (0, T - width)), None, mask.device)
            rows = lines.prompts(lines.last)
        return self.encoding(call.context, call.soft, rows, filled.kv, filled.order)

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keyword pre-hook of an attention block in encoder mode: makes the block's K/V from what enters it. It runs
        inside a checkpointed region, so it is recomputed with it."""
        context = kwargs.get("softkv_prefix")
        if not isinstance(context, SoftContext) or context.encoder is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self.order.number(block)
        return args, kwargs | {"softkv_prefix": replace(context, layers={layer: context.encoder(layer, hidden)})}

    def encoding(
        self,
        context: SoftContext,
        soft: SoftRows,
        prompts: RowPrompts | None,
        memory: dict[int, LayerKV] | None,
        order: Tensor | None,
    ) -> SoftContext:
        """The context with what makes K and V of each block from the prompts that enter it.

        Args:
            order: which of the prompts each row has, where every row has one of its own.
        """
        banks = context.layers or {}

        def encode(layer: int, hidden: Tensor, lengths: Tensor) -> LayerKV:
            return soft.encode(banks.get(layer), layer, hidden, lengths)

        index = order if context.index is None else context.index
        return replace(context, index=index, encoder=RowEncoder(encode, prompts, memory))

    def _positions(self, call: Call, context: SoftContext, kwargs: dict[str, Any]) -> Tensor:
        """Position ids of a forward: each row counts from its first real token, behind its prefix."""
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        B, T = tokens.shape[:2]
        cache, positions, rows = kwargs.get("past_key_values"), kwargs.get("position_ids"), context.rows
        past = cache.get_seq_length() if cache is not None else 0
        if positions is None:
            mask = kwargs.get("attention_mask")
            positions = token_positions(mask if isinstance(mask, Tensor) else None, (B, T), past, tokens.device)
        slots = context.slots_of(B if rows is None else len(rows.cu_seqlens) - 1)
        if isinstance(slots, Tensor):
            slots = slots[:, None] if rows is None else slots.repeat_interleave(rows.cu_seqlens.diff(), output_size=T)
        positions = positions + slots if call.positions_given else positions + (self._offset + slots)
        if self._table is not None and not torch.compiler.is_compiling():
            # Columns bound positions without a look at the device.
            longest = past + T if rows is None else rows.longest
            bounded = not call.positions_given and isinstance(slots, int) and isinstance(longest, int)
            if not bounded or longest + slots + self._offset > self._table:
                self._check_positions(int(positions.max()))
        return positions

    def _check_positions(self, last: int) -> None:
        assert self._table is not None
        if last >= self._table:
            raise ValueError(
                f"prefix and tokens need positions up to {last}, but the model's learned position table ends at "
                f"{self._table - 1}: use a shorter prefix or shorter rows"
            )


def _learned_positions(decoder: nn.Module) -> nn.Embedding | None:
    """The learned table of positions, or None for models that compute them."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in (
            "wpe",
            "embed_positions",
            "position_embeddings",
        ):
            return module
    return None
