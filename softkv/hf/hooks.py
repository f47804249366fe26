"""Keyword pre-hooks through which calls of a `SoftModel` reach the frozen decoder and, in encoder mode, its attention
blocks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv.hf import attention_mass, call_scope, checkpointing, kept_logits
from softkv.hf.context import LayerKV, RowEncoder, RowPrompts, SoftContext
from softkv.hf.frozen import BaseState, UnsupportedAttention
from softkv.hf.generation.cache_state import CacheState, past_length
from softkv.hf.generation.prefill import PackedPrefill
from softkv.hf.generation.prompts import Prompts
from softkv.hf.heads import PackedHeads
from softkv.hf.key_state import UnpaddedMask
from softkv.hf.layout import RowLayout
from softkv.hf.model_call import ModelCall
from softkv.hf.own_attention import OwnAttention
from softkv.hf.past import InPast, PrefixedPast, as_padding_mask
from softkv.hf.placement import check_rows_are_whole
from softkv.hf.prefixes import SoftRows, behind
from softkv.hf.probe import DecoderProbe
from softkv.hf.repeat import CallCache, PassCalls
from softkv.hf.unhooking import unhook
from softkv.ops.checks import transforms
from softkv.ranges import named


class DecoderHooks(DecoderProbe):
    """The pre-hooks of one `SoftModel` on its base's decoder."""

    def __init__(self, base: Any, backend: str | None) -> None:
        super().__init__(base, backend)
        self._reads_blocks = False
        self._head: Any = None
        self._call_cache = CallCache()

    def register(self) -> None:
        """Register the hooks on the decoder."""
        self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        # Run before hooks of others, which must see the rows as given.
        self.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, prepend=True)
        if self.positions.counting_table is not None:
            self.positions.counting_table.register_forward_pre_hook(self._enter_positions, with_kwargs=True)
            self.positions.counting_table.register_forward_hook(self._leave_positions)
        head = self.base.get_output_embeddings()
        if head is not None and not kept_logits.by_model(self.base):
            self._head = head.register_forward_pre_hook(self._enter_head)

    def fall_back(self, reason: UnsupportedAttention) -> OwnAttention:
        """Let the base keep its own attention.

        Raises:
            UnsupportedAttention: if other holders need softkv's attention, or rows can't contain soft tokens either.
        """
        self.remove()
        BaseState.keep_own_attention(self.base, reason)
        self.register()
        return self.keep_own_attention(reason)

    def hook_blocks(self) -> None:
        """Register the hooks through which encoders read the inputs of attention modules."""
        if self._reads_blocks:
            return
        if self.order.repeats:
            raise ValueError(
                f"{type(self.base).__name__} runs an attention module several times per pass, which a prompt "
                "encoder does not support: leave the encoder out"
            )
        self._reads_blocks = True
        for block in self.order.modules:
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True)

    def remove(self) -> None:
        """Remove every hook, also after an interrupted registration."""
        if self._head is not None:
            self._head.remove()
        unhook(self, self.decoder.modules())
        if self.own is not None and self.own.carrier is not None:
            self.own.carrier.remove(self)

    def embed(self, ids: Tensor, soft_tokens: Tensor) -> Tensor:
        """Embeddings `[B, T, C]` of ids, with soft token -i-1 where an id i is negative."""
        embeds = self.base.get_input_embeddings()(ids.clamp(min=0))
        soft = soft_tokens.to(embeds.dtype)[(-ids - 1).clamp(min=0)]
        return torch.where((ids < 0)[:, :, None], soft, embeds)

    # While one thread registers a hook, another may call it before torch knows that it takes keywords. `kwargs` is then
    # missing, and the call is not one of this SoftModel.

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of the decoder: adds soft embeddings, positions after the prefix, and the prefix."""
        call = call_scope.current()
        if kwargs is None or call is None or call.hooks is not self:
            return None
        if args:
            kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        context = call.context
        if isinstance(kwargs.get("logits_to_keep"), int):  # some leave out tokens early: rows would not be whole
            kwargs["logits_to_keep"] = 0
        if call.embeds is not None:
            given, embeds = kwargs.get("inputs_embeds"), call.embeds
            if call.soft_at is not None and given is not None:
                if given.shape[1] != embeds.shape[1]:
                    raise ValueError(
                        f"{type(self.base).__name__} passes {given.shape[1]} columns to its text model for "
                        f"{embeds.shape[1]} ids: expected one id per embedding of images or audio"
                    )
                embeds = torch.where(call.soft_at[:, :, None], embeds.to(given), given)
            kwargs["inputs_embeds"], kwargs["input_ids"] = embeds, None
        if call.prompts is not None:
            context = self._enter_generation(call, call.prompts, kwargs)
        if self.own is not None:
            self._enter_own(self.own, call, decoder, kwargs)
            return (), kwargs
        if context.capture is None:
            kwargs["position_ids"] = self.positions.of(call, context, kwargs)
            if context.heads is not None:
                context = self._with_heads(context, kwargs)
            elif call.prompts is not None and context.encoder is None and self.behaviour.packs:
                context = self._without_padding(context, kwargs)
            compiles = torch.compiler.is_compiling()
            if not compiles:
                check_rows_are_whole()
            masses = None if compiles else attention_mass.wanted()
            if compiles or masses is not None:
                context = replace(context, order=self.order, turns={}, masses=masses)
            else:
                cache = None if transforms() else self._call_cache  # calls under torch.func are validated each time
                steps = None if cache is None else _steps(context, kwargs)
                context = replace(context, order=self.order, turns={}, kept_calls=PassCalls(cache), steps=steps)
        if not call.may_be_packed or context.rows is not None or context.line is not None:
            self._mark_unpadded(kwargs)
        if self.positions.counting_table is not None:
            call.position_ids[:] = [kwargs["position_ids"]] if "position_ids" in kwargs else []
        kwargs["softkv_prefix"] = context
        return (), kwargs

    def _enter_positions(self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of a table that counts columns, of which there may be more than it has positions: packed
        rows, or padding."""
        call = call_scope.current()
        if kwargs is None or call is None or call.hooks is not self or not call.position_ids:
            return None
        return args, kwargs | {"position_ids": torch.zeros_like(call.position_ids[0][0])}

    def _leave_positions(self, table: nn.Module, args: tuple[Any, ...], output: Any = None) -> Tensor | None:
        """Forward hook of a table that counts columns: each row counts from its first real token, after its prefix."""
        call = call_scope.current()
        if output is None or call is None or call.hooks is not self or not call.position_ids:
            return None
        return self.positions.looked_up(call.position_ids[0])

    def _enter_own(self, own: OwnAttention, call: ModelCall, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
        """Add positions and the prefix to the keywords of a decoder that keeps its own attention."""
        if own.causal and isinstance(own.carrier, InPast):  # its layers have no windows, so no mask contains any
            kwargs["attention_mask"] = as_padding_mask(kwargs.get("attention_mask"))
        if own.takes_positions:
            kwargs["position_ids"] = self.positions.of(call, call.context, kwargs)
        elif self.positions.table is not None:
            tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            self.positions.check(past_length(kwargs.get("past_key_values")) + tokens.shape[1] - 1)
        if own.carrier is not None and (call.context.layers is not None or call.context.capture is not None):
            own.carrier.enter(decoder, call.context, kwargs)

    def _mark_unpadded(self, kwargs: dict[str, Any]) -> None:
        """Mark that no token is padding; without a mask, transformers would look for packed rows in the values of
        position ids."""
        if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None and self.behaviour.packs:
            tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            shape = (tokens.shape[0], tokens.shape[1])
            if torch.compiler.is_compiling():  # a tracer takes a plain tensor
                kwargs["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=tokens.device)
            else:
                kwargs["attention_mask"] = UnpaddedMask.of(shape, tokens.device)

    def _with_heads(self, context: SoftContext, kwargs: dict[str, Any]) -> SoftContext:
        """Pack heads with the rows, or run them in a separate pass if an argument of the rows can't be handled."""
        assert context.heads is not None
        line = PackedHeads.of(context, kwargs)
        if line is not None:
            line.lead(context.heads, kwargs, self.base.get_input_embeddings(), self.first)
            return replace(context, heads=None, line=line)
        with named("head once"):  # a copy, because some models scale their input in place
            blocks = self.capture(inputs_embeds=context.heads.to(self.base.dtype, copy=True))
        layers = {}
        for number, block in enumerate(blocks):
            kv = block.key, block.value
            if context.layers is not None:
                kv = behind(context.layers[number], kv)
            layers[number] = kv
        return replace(context, heads=None, layers=layers)

    def _without_padding(self, context: SoftContext, kwargs: dict[str, Any]) -> SoftContext:
        """Pack padded prompts if the padding can be restored."""
        unpadded = PackedPrefill.of(kwargs)
        if unpadded is None:
            return context
        unpadded.pack(kwargs)
        return replace(context, rows=unpadded.rows(), unpadded=unpadded)

    def _leave_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        """Forward hook of the decoder: restores the padding of rows that were packed on entry."""
        call = call_scope.current()
        if output is None or call is None or call.hooks is not self:
            return None
        if self.own is not None:
            past = kwargs.get("past_key_values")
            return past.restore_cache(output, self.layers) if isinstance(past, PrefixedPast) else None
        context = kwargs["softkv_prefix"]
        if context.line is not None:
            return context.line.leave(output)
        return None if context.unpadded is None else context.unpadded.unpack(output, kwargs.get("past_key_values"))

    def _enter_generation(self, call: ModelCall, prompts: Prompts, kwargs: dict[str, Any]) -> SoftContext:
        """A forward inside `generate`: adds soft embeddings of the prompt, and the encoder of its rows."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        checkpointing.check_keeps_cache(self.decoder, cache)
        B, T = tokens.shape[:2]
        prompt = prompts.ids if prompts.embeds is None else prompts.embeds
        assert prompt is not None
        assert call.soft is not None
        width, state = prompt.shape[1], CacheState.of(cache)
        if state is None:
            begun = cache is not None and cache.get_seq_length() > 0  # in a cache created by the model itself
            state = CacheState(prompts.columns, B, call.soft.names, prompts.mask_for(B), unread=0 if begun else width)
            if cache is not None:
                state.store_on(cache)
        unread, state.unread = state.unread, max(state.unread - T, 0)
        if prompts.soft_at is not None and unread:
            assert call.soft_tokens is not None
            at = prompts.soft_at[:, -unread:][:, :T]
            at = F.pad(at, (0, T - at.shape[1]), value=-1).repeat_interleave(B // len(at), 0)
            if ids is not None:
                embeds, kwargs["input_ids"] = self.embed(torch.where(at < 0, ids, -at - 1), call.soft_tokens), None
            else:  # a wrapped decoder gets embeddings, including those of images
                soft = call.soft_tokens.to(tokens.dtype)[at.clamp(min=0)]
                embeds = torch.where((at >= 0)[:, :, None], soft, tokens)
            kwargs["inputs_embeds"] = embeds
        if not call.soft.encodes:
            return call.context
        rows = None
        if not state.kv:
            if width > T:
                raise ValueError(
                    f"encoder-mode P-tuning v2 reads whole prompts at once: expected {width} columns in the first "
                    f"forward of a cache, got {T} (leave prefill_chunk_size out)"
                )
            mask = prompts.mask_for(B)
            if mask is None:
                mask = torch.ones(B, width, device=prompt.device)
            layout = RowLayout.of((B, T), F.pad(mask, (0, T - width)), None, mask.device)
            rows = layout.prompts(layout.last)
        return self.encoding(call.context, call.soft, rows, state.kv, state.order)

    def _enter_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = call_scope.current()
        if call is None or call.hooks is not self or call.kept is None:
            return None
        return (kept_logits.chosen(arguments[0], call.kept), *arguments[1:])

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of an attention block in encoder mode: computes the block's K/V from its input. It runs
        inside checkpointed regions and is recomputed with them."""
        context = None if kwargs is None else kwargs.get("softkv_prefix")
        if kwargs is None or context is None or context.encoder is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self.order.number(block)
        encoded = replace(context, layers={layer: context.encoder(layer, hidden)}, encoder=None)
        return args, kwargs | {"softkv_prefix": encoded}

    def encoding(
        self,
        context: SoftContext,
        soft: SoftRows,
        prompts: RowPrompts | None,
        memory: dict[int, LayerKV] | None,
        order: Tensor | None,
    ) -> SoftContext:
        """The context with the encoder that computes K and V of each block from prompts.

        Args:
            order: the index of each row's prompt, if every row has its own.
        """
        banks = context.layers or {}

        def encode(layer: int, hidden: Tensor, lengths: Tensor) -> LayerKV:
            return soft.encode(banks.get(layer), layer, hidden, lengths, self.parallel)

        index = order if context.index is None else context.index
        return replace(context, index=index, encoder=RowEncoder(encode, prompts, memory))


def _steps(context: SoftContext, kwargs: dict[str, Any]) -> dict[int, Any] | None:
    """The dict in which blocks keep the functions that they run in decoding steps of a cache; None without one."""
    state = CacheState.of(kwargs.get("past_key_values"))
    return None if state is None or context.encoder is not None or is_in_torch_dispatch_mode() else state.steps
