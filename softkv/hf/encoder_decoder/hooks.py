"""Keyword pre-hooks through which calls of a `SoftModel` reach the encoder, the decoder and the cross-attention of a
frozen encoder-decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf import call_scope, checkpointing
from softkv.hf.behaviour import Behaviour
from softkv.hf.context import BlockOrder, SoftContext
from softkv.hf.encoder_decoder.calls import EncoderDecoderCall, check_same_bias
from softkv.hf.encoder_decoder.positions import SlotBiases, shifted_output
from softkv.hf.encoder_decoder.rows import encoded_mask, encoder_rows
from softkv.hf.generation.cache_state import CacheState, past_length
from softkv.hf.own_attention import OwnAttention
from softkv.hf.positions import learned_positions, position_table, table_size, takes_position_ids
from softkv.hf.repeat import PassCalls
from softkv.hf.unhooking import unhook
from softkv.methods.where import SITES, Site


class EncoderDecoderHooks:
    """The pre-hooks of one `SoftModel` on the two stacks of its base.

    Attributes:
        base: the frozen model.
        encoder, decoder: its stacks.
        orders: the attention blocks that softkv can replace, by site; set by the probe.
        biases: the relative position biases of slots, by site; set by the probe.
        reads_tokens: whether the encoder reads tokens rather than audio or images.
        embed_scale: the factor that the encoder applies to embeddings of ids, outside the embedding layer.
        behaviour: of the encoder; set by the probe.
        own: of a base that keeps its own attention, else None.
    """

    parallel = None  # `check_base` refuses tensor parallelism

    def __init__(self, base: Any, backend: str | None) -> None:
        self.base, self.backend = base, backend
        self.encoder, self.decoder = cast(nn.Module, base.get_encoder()), cast(nn.Module, base.get_decoder())
        self.orders: dict[Site, BlockOrder] = {}
        self.biases: dict[Site, SlotBiases | None] = {}
        self.reads_tokens, self.embed_scale = True, 1.0
        self.behaviour = Behaviour(packs=False, carries=False)
        self.own: OwnAttention | None = None
        self._tables = {"encoder": position_table(self.encoder), "decoder": position_table(self.decoder)}

    @property
    def order(self) -> BlockOrder:
        """The blocks of all sites."""
        return BlockOrder([block for site in SITES if site in self.orders for block in self.orders[site].blocks])

    @property
    def counts(self) -> list[tuple[Site, int]]:
        """The sites, with the number of blocks at each."""
        return [(site, len(self.orders[site])) for site in SITES if site in self.orders]

    def register(self) -> None:
        """Register the hooks on the stacks and their position tables."""
        self.encoder.register_forward_pre_hook(self._enter_encoder, with_kwargs=True)
        self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        for table, hook in zip(self._tables.values(), (self._encoder_positions, self._decoder_positions), strict=True):
            if table is not None:
                table.register_forward_hook(hook, with_kwargs=True)

    def hook_cross(self, blocks: list[nn.Module]) -> None:
        """Register the hooks that give cross-attention its own context."""
        for block in blocks:
            block.register_forward_pre_hook(self._enter_cross, with_kwargs=True)

    def remove(self) -> None:
        """Remove every hook, also after an interrupted registration."""
        unhook(self, (*self.encoder.modules(), *self.decoder.modules()))

    def run(self, call: EncoderDecoderCall, function: Callable[..., Any], **kwargs: Any) -> Any:
        """Run the base, or a part of it, as this call."""
        return call_scope.run(call, function, **kwargs)

    def embed(self, ids: Tensor, soft_tokens: Tensor) -> Tensor:
        """Embeddings `[B, S, C]` of ids, with soft token -i-1 where an id i is negative."""
        embeds = self.base.get_input_embeddings()(ids.clamp(min=0)) * self.embed_scale
        soft = soft_tokens.to(embeds.dtype)[(-ids - 1).clamp(min=0)]
        return torch.where((ids < 0)[:, :, None], soft, embeds)

    def _current_call(self, kwargs: dict[str, Any] | None) -> EncoderDecoderCall | None:
        """The running call, if it belongs to this model. (`kwargs` is None if another thread calls a hook that is being
        registered, before torch knows that it takes keywords.)"""
        call = call_scope.current()
        return None if kwargs is None or call is None or call.hooks is not self else call

    def _enter_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of the encoder: inserts soft tokens, moves padding to the right, shifts positions and passes
        the prefix."""
        call = self._current_call(kwargs)
        if call is None:
            return None
        kwargs = _as_keywords(encoder, args, kwargs)
        read = kwargs.get(self.base.main_input_name)
        call.check_all_rows(len(_tokens(kwargs) if read is None else read))
        if self.reads_tokens and call.soft is not None:
            kwargs |= {} if call.ids is None else {"input_ids": call.ids}
            kwargs = encoder_rows(kwargs, call.tokens, self.embed)
        self._pass_prefix(call, "encoder", kwargs)
        return (), kwargs

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of the decoder: shifts positions, and passes the prefixes of self- and cross-attention and
        the mask of the encoder's rows."""
        call = self._current_call(kwargs)
        if call is None:
            return None
        kwargs = _as_keywords(decoder, args, kwargs)
        states, cache = kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values")
        checkpointing.check_keeps_cache(decoder, cache)
        if call.soft is not None and self.reads_tokens and states is not None:
            mask = kwargs.get("encoder_attention_mask")
            kwargs["encoder_attention_mask"] = encoded_mask(mask, call.tokens, (states.shape[0], states.shape[1]))
        if call.soft is not None and cache is not None and CacheState.of(cache) is None and not past_length(cache):
            rows = len(_tokens(kwargs))
            CacheState(
                0, rows, call.soft.names if len(call.soft.names) == 1 else tuple(call.soft.names_of(rows))
            ).store_on(cache)
        self._pass_prefix(call, "decoder", kwargs)
        return (), kwargs

    def _enter_cross(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of a cross-attention block. It runs inside a checkpointed region, so it is recomputed with
        it."""
        context = None if kwargs is None else kwargs.get("softkv_prefix")
        if kwargs is None or context is None or context.cross is None:
            return None
        return args, kwargs | {"softkv_prefix": context.cross}

    def _pass_prefix(self, call: EncoderDecoderCall, stack: Site, kwargs: dict[str, Any]) -> None:
        """Add the prefixes of a stack to its keywords, and shift its position ids."""
        bare = SoftContext(backend=self.backend)
        context, cross = self._site_context(call, stack), None
        if stack == "decoder":
            cross = self._site_context(call, "cross")
        if context is None and cross is None:
            return
        if context is not None and (isinstance(context.slots, Tensor) or context.slots):
            self._shift_positions(call, context, stack, kwargs)
        context = context or bare
        kwargs["softkv_prefix"] = context if context.capture is not None else replace(context, cross=cross or bare)

    def _site_context(self, call: EncoderDecoderCall, site: Site) -> SoftContext | None:
        """The context of the attention at a site; None if it has no prefix there."""
        order, context = self.orders.get(site), call.context(site)
        if context.layers is None or order is None:
            return context if context.capture is not None else None
        bias = self.biases.get(site)
        if bias is not None:
            check_same_bias(context, type(self.base).__name__)
        kept_calls = None if torch.compiler.is_compiling() else PassCalls()
        bias = bias if context.window_covers is True else None
        return replace(context, backend=self.backend, order=order, kept_calls=kept_calls, bias=bias)

    def _shift_positions(
        self, call: EncoderDecoderCall, context: SoftContext, stack: Site, kwargs: dict[str, Any]
    ) -> None:
        """Shift the position ids of a stack by the number of slots. Stacks without position ids are shifted by the hook
        on their position table."""
        module, table = (self.encoder, self.decoder)[stack == "decoder"], self._tables[stack]
        tokens = _tokens(kwargs)
        before = past_length(kwargs.get("past_key_values")) if stack == "decoder" else 0
        call.rows[stack] = len(tokens)
        slots = context.slots_of(len(tokens))
        if table is None and takes_position_ids(module):
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(before, before + tokens.shape[1], device=tokens.device)[None]
            kwargs["position_ids"] = positions + (slots if isinstance(slots, int) else slots[:, None])
        if self._table_size(stack) is not None and not torch.compiler.is_compiling():
            slots = slots if isinstance(slots, int) else int(slots.max())
            self.check_positions(stack, before + tokens.shape[1] - 1 + slots)

    def _table_size(self, stack: Site) -> int | None:
        """The number of positions in a stack's table; None if it computes them."""
        table, module = self._tables[stack], (self.encoder, self.decoder)[stack == "decoder"]
        return table_size(learned_positions(module) if table is None and takes_position_ids(module) else table)

    def check_positions(self, stack: Site, last: int) -> None:
        """Raise if a position is past the end of a stack's table."""
        size = self._table_size(stack)
        if size is not None and last >= size:
            raise ValueError(
                f"prefix and tokens of the {stack} need positions up to {last}, but the model's position table "
                f"ends at {size - 1}: use a shorter prefix or shorter rows"
            )

    def _encoder_positions(self, table: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        return self._table_output(table, args, kwargs, output, "encoder")

    def _decoder_positions(self, table: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        return self._table_output(table, args, kwargs, output, "decoder")

    def _table_output(self, table: nn.Module, args: Any, kwargs: Any, output: Any, stack: Site) -> Any:
        """Forward hook of a position table: looks up positions after the prefix."""
        call = self._current_call(None if output is None else kwargs)
        if call is None or stack not in call.rows:
            return None
        return shifted_output(table, args, kwargs, call.context(stack).slots_of(call.rows[stack]))


def _as_keywords(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)) | (kwargs or {})


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """The input of a stack: ids, embeddings, or the features of audio or images."""
    for name in ("inputs_embeds", "input_ids"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next(each for each in kwargs.values() if isinstance(each, Tensor))
