"""Keyword pre-hooks through which calls of a `SoftModel` reach the frozen decoder and, in encoder mode, its attention
blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.evaluation import in_evaluation
from softkv.hf import calls, kept_logits
from softkv.hf.behaviour import TOKENS, Behaviour, behaviour_of, same, tolerance
from softkv.hf.context import BlockInputs, BlockOrder, LayerKV, RowEncoder, RowPrompts, SoftContext
from softkv.hf.frozen import OutOfReach, decoder_of
from softkv.hf.generation.cache_state import CacheState, past_length
from softkv.hf.generation.prefill import Unpadded
from softkv.hf.generation.prompts import Prompts
from softkv.hf.heads import HeadLine
from softkv.hf.key_state import AllReal
from softkv.hf.layout import RowLayout, packed_positions, token_positions
from softkv.hf.masks import padding_mask
from softkv.hf.own_attention import OwnAttention
from softkv.hf.placement import device_of
from softkv.hf.prefixes import SoftRows, behind
from softkv.hf.tensor_parallel import TensorParallel, check_even
from softkv.hf.vocabulary import named_ids
from softkv.ranges import named

# What a model raises that softkv's attention does not suit; softkv's own refusals are ValueErrors.
_OBSCURE = (AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError)


@dataclass(frozen=True)
class ModelCall:
    """One running `forward` or `generate`, as the pre-hooks see it.

    Attributes:
        hooks: of the SoftModel that was called. Others on the same base leave the call alone.
        context: what goes to the attention blocks.
        soft: the soft prompts of its rows; None in a run of the bare decoder.
        prompts: of a `generate`.
        soft_tokens: `[K, C]`, of a `generate` whose prompts hold soft tokens.
        positions_given: whether position ids are the user's own.
        model: the SoftModel, in a `generate`.
        embeds: `[B, T, C]`, what the decoder reads in place of the ids that reach it, or None.
        kept: of what positions logits are wanted, where transformers has no argument for it.
    """

    hooks: DecoderHooks
    context: SoftContext
    soft: SoftRows | None = None
    prompts: Prompts | None = None
    soft_tokens: Tensor | None = None
    positions_given: bool = False
    model: Any = None
    embeds: Tensor | None = None
    kept: Tensor | None = None


class DecoderHooks:
    """The pre-hooks of one `SoftModel` on its base's decoder.

    Attributes:
        base: the frozen model.
        order: its attention blocks; known after `probe`.
        behaviour: what it does with tokens; known after `probe`.
        own: of a base that keeps its own attention.
        parallel: the processes that the base is split over; known after `probe`.
    """

    def __init__(self, base: Any, backend: str | None) -> None:
        self.base, self.backend = base, backend
        self.decoder = cast(nn.Module, decoder_of(base))
        self.order = BlockOrder()
        self.behaviour = Behaviour(packs=False, carries=False)
        self.own: OwnAttention | None = None
        self.parallel: TensorParallel | None = None
        self._reads_blocks = False
        self._head: Any = None
        self._offset = 0
        table = _learned_positions(self.decoder)
        self._table = None if table is None else table.num_embeddings - int(getattr(table, "offset", 0))

    def register(self) -> None:
        """Hooks the decoder."""
        self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        self.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True)
        head = self.base.get_output_embeddings()
        if head is not None and not kept_logits.by_model(self.base):
            self._head = head.register_forward_pre_hook(self._enter_head)

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
        for block in self.order.modules:
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True)

    def remove(self) -> None:
        """Takes every hook off, whatever came between hooking and this."""
        if self._head is not None:
            self._head.remove()
        for module in self.decoder.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    module._forward_hooks_with_kwargs.pop(number, None)

    def run(self, call: ModelCall, function: Callable[..., Any], **kwargs: Any) -> Any:
        """Runs the base, or a part of it, as this call."""
        return calls.run(call, function, **kwargs)

    def capture(self, decoder: nn.Module | None = None, **inputs: Tensor) -> list[BlockInputs]:
        """What reaches the attention blocks in a forward pass of the bare decoder (or of a view of it)."""
        context = SoftContext(backend=self.backend, capture=[])
        self.run(ModelCall(self, context), decoder or self.decoder, **inputs, use_cache=False)
        assert context.capture is not None
        return context.capture

    def probe(self) -> list[BlockInputs]:
        """Runs a few tokens through the decoder to see its attention blocks, and what it does with tokens.

        Raises:
            OutOfReach: when softkv can't take the place of its attention.
        """
        name, device, view = type(self.base).__name__, device_of(self.base), in_evaluation(self.decoder)
        if getattr(self.base.config.get_text_config(), "attention_chunk_size", None) is not None:
            raise OutOfReach(f"{name} uses chunked attention, which softkv attention does not offer")
        ids = self._few_tokens()
        context = SoftContext(backend=self.backend, capture=[])
        assert context.capture is not None
        try:
            # Without values, transformers can't look whether rows are packed: a mask says that they are not.
            masks = {"attention_mask": torch.ones_like(ids)} if device.type == "meta" else {}
            row = self._hidden(view, context, input_ids=ids, **masks)
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise self._not_run(error) from error
            context.capture.clear()
        except (*_OBSCURE, ValueError) as error:
            if _raised_in("softkv.hf.", error):
                raise OutOfReach(str(error).partition(": use attn_implementation")[0]) from error
            if _raised_in("softkv.", error):
                raise
            raise self._not_run(error) from error
        blocks = context.capture
        if not blocks:
            raise OutOfReach(
                f"{name} does not pass keywords through to transformers' attention interface, so softkv can't reach "
                "its attention"
            )
        self._check_positions_are_taken(name)
        self._offset = self._first_position()
        of_view = {id(module): name for name, module in view.named_modules()}
        in_view = BlockOrder([each.block for each in blocks])
        blocks = [each._replace(block=self.decoder.get_submodule(of_view[id(each.block)])) for each in blocks]
        causal = all(each.causal for each in blocks)
        if causal and device.type != "meta":

            def run(context: SoftContext, at: Tensor, positions: Tensor) -> Tensor:
                return self._hidden(
                    view, replace(context, backend=self.backend), input_ids=ids[:, at], position_ids=positions
                )

            self.order = in_view
            try:
                self.behaviour = behaviour_of(run, row, blocks)
                if not self.behaviour.packs:
                    self.behaviour = replace(self.behaviour, pads=self._pads(view, ids, row))
            except _OBSCURE as error:
                raise self._not_run(error) from error
        else:
            layers = self.base.config.get_text_config().num_hidden_layers
            alone = len(blocks) == layers  # attention is all there is, as far as can be told without values
            self.behaviour = Behaviour(packs=alone, carries=alone and causal)
        if row.device.type != "meta":
            self.behaviour = replace(self.behaviour, embeds=self._embeds(view, ids, row))
        self.order = BlockOrder([each.block for each in blocks])
        self.parallel = TensorParallel.of(self.base, blocks)
        return blocks

    def keep_own_attention(self, reason: OutOfReach) -> OwnAttention:
        """Runs a few tokens through a decoder that keeps its own attention.

        Raises:
            OutOfReach: when soft tokens can't be put into its rows either.
        """
        own = OwnAttention.of(self.decoder, self.base, self._few_tokens(), str(reason))
        if own is None:
            raise OutOfReach(
                "softkv.attach expects attention that it can take the place of, or a model that takes inputs_embeds, "
                "keeps its past in past_key_values and sees no padding in front, "
                f"got {type(self.base).__name__} ({reason})"
            )
        self.own = own
        self.behaviour = Behaviour(packs=False, carries=False, embeds=own.embeds)
        if own.takes_positions:
            self._offset = self._first_position()
        return own

    def _few_tokens(self) -> Tensor:
        """Ids `[1, TOKENS]` of words: RoBERTa gives padding a position of its own, wrappers look for images by ids."""
        rows, named = self.base.get_input_embeddings().num_embeddings, named_ids(self.base.config)
        ids = [token for token in range(1, rows) if token not in named][:TOKENS]
        return torch.tensor([(ids or [0]) * TOKENS], device=device_of(self.base))[:, :TOKENS]

    def _pads(self, decoder: nn.Module, ids: Tensor, row: Tensor) -> bool:
        """Whether a row behind padding is the same row: some states take padding for tokens."""
        half = TOKENS // 2
        mask, positions = F.pad(torch.ones_like(ids), (half, 0)), torch.arange(TOKENS, device=ids.device)
        padded = {"input_ids": F.pad(ids, (half, 0), value=int(ids[0, 0])), "attention_mask": mask}
        padded["position_ids"] = F.pad(positions, (half, 0))[None]
        got = self._hidden(decoder, SoftContext(backend=self.backend), **padded)
        return same(got[0, half:], row[0])

    def check_pads(self) -> None:
        """Raise where padding in front of a row would change it."""
        if not self.behaviour.pads:
            raise ValueError(
                f"{type(self.base).__name__} takes padding in front of a row for tokens, in states beside its "
                "attention: expected rows of one length, or padding behind them and use_cache=False"
            )

    def _embeds(self, decoder: nn.Module, ids: Tensor, row: Tensor) -> bool:
        """Whether embeddings in place of ids give the same row."""
        # Not quite those of the vocabulary, in which some models would look them up.
        embeds = self.base.get_input_embeddings()(ids).detach() * (1 + tolerance(row.dtype) / 4)
        try:
            got = self._hidden(decoder, SoftContext(backend=self.backend, capture=[]), inputs_embeds=embeds)
        except (*_OBSCURE, ValueError):
            return False
        return same(got[0], row[0])

    @torch.no_grad()
    def _hidden(self, decoder: nn.Module, context: SoftContext, **inputs: Tensor) -> Tensor:
        output = self.run(ModelCall(self, context), decoder, **inputs, use_cache=False)
        return output if isinstance(output, Tensor) else output[0]

    def _not_run(self, error: Exception) -> OutOfReach:
        check_even(self.base)
        return OutOfReach(
            f"softkv.attach could not run {type(self.base).__name__} with attention of softkv's on token ids alone: "
            f"{type(error).__name__}: {error}"
        )

    def _check_positions_are_taken(self, name: str) -> None:
        """Tokens stand behind a prefix by their position ids: a decoder must take them."""
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            raise OutOfReach(f"{name} takes no position_ids, so softkv can't place its tokens behind a prefix")

    def _first_position(self) -> int:
        """The position id of a row's first token: RoBERTa's stands past its table's row for padding."""
        table = _learned_positions(self.decoder)
        if table is None or table.padding_idx is None:
            return 0
        read: list[int] = []
        token = int(self.base.config.get_text_config().pad_token_id == 0)  # any but padding
        ids = torch.full((1, 1), token, device=device_of(self.base))
        note = table.register_forward_pre_hook(lambda _, args: read.append(int(args[0].flatten()[0])))
        try:
            view = in_evaluation(self.decoder)
            with torch.no_grad():
                calls.run(None, view, input_ids=ids)
                calls.run(None, view, input_ids=ids, position_ids=torch.zeros_like(ids))
        finally:
            note.remove()
        return read[0] - read[1] if len(read) == 2 else 0

    def embed(self, ids: Tensor, soft_tokens: Tensor) -> Tensor:
        """Embeddings `[B, T, C]` of ids, with soft token -i-1 where an id i is negative."""
        embeds = self.base.get_input_embeddings()(ids.clamp(min=0))
        soft = soft_tokens.to(embeds.dtype)[(-ids - 1).clamp(min=0)]
        return torch.where((ids < 0)[:, :, None], soft, embeds)

    # While a thread registers a hook, others may call it before torch knows that it takes keywords: `kwargs` is then
    # missing, and the call is none of this SoftModel's.

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of the decoder: soft embeddings, positions behind the prefix, and the prefix."""
        call = calls.under_way()
        if kwargs is None or call is None or call.hooks is not self:
            return None
        if args:
            kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        context = call.context
        if call.embeds is not None:
            kwargs["inputs_embeds"], kwargs["input_ids"] = call.embeds, None
        if call.prompts is not None:
            context = self._enter_generation(call, call.prompts, kwargs)
        if self.own is not None:
            self._enter_own(self.own, call, kwargs)
            return (), kwargs
        if context.capture is None:
            kwargs["position_ids"] = self._positions(call, context, kwargs)
            if context.heads is not None:
                context = self._with_heads(context, kwargs)
            elif call.prompts is not None and context.encoder is None and self.behaviour.packs:
                context = self._without_padding(context, kwargs)
            memo: dict[Any, Any] | None = None if torch.compiler.is_compiling() else {}
            lasting = None if memo is None else _of_steps(context, kwargs)
            context = replace(context, order=self.order, turns={}, memo=memo, lasting=lasting)
        if not call.positions_given or context.rows is not None or context.line is not None:
            self._tell_real(kwargs)
        kwargs["softkv_prefix"] = context
        return (), kwargs

    def _enter_own(self, own: OwnAttention, call: ModelCall, kwargs: dict[str, Any]) -> None:
        """The positions of a decoder that keeps its own attention, where it takes any."""
        if own.takes_positions:
            kwargs["position_ids"] = self._positions(call, call.context, kwargs)
        elif self._table is not None:
            tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            self._check_positions(past_length(kwargs.get("past_key_values")) + tokens.shape[1] - 1)

    def _tell_real(self, kwargs: dict[str, Any]) -> None:
        """Says that no token is padding: transformers would look for packed rows in the values of position ids."""
        if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None and self.behaviour.packs:
            tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            shape = (tokens.shape[0], tokens.shape[1])
            if torch.compiler.is_compiling():  # a tracer takes a plain tensor
                kwargs["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=tokens.device)
            else:
                kwargs["attention_mask"] = AllReal.of(shape, tokens.device)

    def _with_heads(self, context: SoftContext, kwargs: dict[str, Any]) -> SoftContext:
        """Heads in one line with the rows; in a pass of their own where some argument of the rows can't follow."""
        assert context.heads is not None
        line = HeadLine.of(context, kwargs)
        if line is not None:
            line.lead(context.heads, kwargs, self.base.get_input_embeddings(), self._offset)
            return replace(context, heads=None, line=line)
        with named("head once"):  # of a copy: some models scale what they are given in place
            blocks = self.capture(inputs_embeds=context.heads.to(self.base.dtype, copy=True))
        layers = {}
        for number, block in enumerate(blocks):
            kv = block.key, block.value
            if context.layers is not None:
                kv = behind(context.layers[number], kv)
            layers[number] = kv
        return replace(context, heads=None, layers=layers)

    def _without_padding(self, context: SoftContext, kwargs: dict[str, Any]) -> SoftContext:
        """Packs padded prompts where the padding can be restored."""
        unpadded = Unpadded.of(kwargs)
        if unpadded is None:
            return context
        unpadded.pack(kwargs)
        return replace(context, rows=unpadded.rows(), unpadded=unpadded)

    def _leave_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        """Forward hook of the decoder: restores the padding of rows that were packed on entry."""
        call = calls.under_way()
        if output is None or call is None or call.hooks is not self or self.own is not None:
            return None
        context = kwargs["softkv_prefix"]
        if context.line is not None:
            return context.line.leave(output)
        return None if context.unpadded is None else context.unpadded.unpack(output, kwargs.get("past_key_values"))

    def _enter_generation(self, call: ModelCall, prompts: Prompts, kwargs: dict[str, Any]) -> SoftContext:
        """A forward inside `generate`: soft embeddings where the prompt has them, and the encoder of its rows."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        B, T = tokens.shape[:2]
        prompt = prompts.ids if prompts.embeds is None else prompts.embeds
        assert prompt is not None
        assert call.soft is not None
        width, state = prompt.shape[1], CacheState.of(cache)
        if state is None:
            begun = cache is not None and cache.get_seq_length() > 0  # in a cache that the model has made itself
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
            else:  # a wrapped decoder is given embeddings, of images too
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
        call = calls.under_way()
        if call is None or call.hooks is not self or call.kept is None:
            return None
        return (kept_logits.chosen(arguments[0], call.kept), *arguments[1:])

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Keyword pre-hook of an attention block in encoder mode: makes the block's K/V from what enters it. It runs
        inside a checkpointed region, so it is recomputed with it."""
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
        """The context with what makes K and V of each block from the prompts that enter it.

        Args:
            order: which of the prompts each row has, where every row has one of its own.
        """
        banks = context.layers or {}

        def encode(layer: int, hidden: Tensor, lengths: Tensor) -> LayerKV:
            return soft.encode(banks.get(layer), layer, hidden, lengths, self.parallel)

        index = order if context.index is None else context.index
        return replace(context, index=index, encoder=RowEncoder(encode, prompts, memory))

    def _positions(self, call: ModelCall, context: SoftContext, kwargs: dict[str, Any]) -> Tensor:
        """Position ids of a forward: each row counts from its first real token, behind its prefix."""
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        B, T = tokens.shape[:2]
        cache, positions, rows = kwargs.get("past_key_values"), kwargs.get("position_ids"), context.rows
        past = cache.get_seq_length() if cache is not None else 0
        mask, given = padding_mask(kwargs.get("attention_mask")), call.positions_given
        if positions is None:
            positions = token_positions(mask, (B, T), past, tokens.device)
        elif rows is not None and self._offset:  # positions that restart only say where rows begin
            positions, given = packed_positions(rows, T), False
        elif not given and call.prompts is None and mask is not None and positions.shape == (1, T):
            # A wrapper around the decoder has counted columns, padding among them.
            counted = token_positions(mask, (B, T), past, tokens.device) + (positions[:, :1] - past)
            positions = torch.where((positions.diff() == 1).all(), counted, positions)
        slots = context.slots_of(B if rows is None else len(rows.cu_seqlens) - 1)
        if isinstance(slots, Tensor):
            slots = slots[:, None] if rows is None else slots.repeat_interleave(rows.cu_seqlens.diff(), output_size=T)
        positions = positions + slots if given else positions + (self._offset + slots)
        if self._table is not None and not torch.compiler.is_compiling():
            # Columns bound positions without a look at the device.
            longest = past + T if rows is None else rows.longest
            bounded = not call.positions_given and isinstance(slots, int) and isinstance(longest, int)
            if not bounded or longest + slots + self._offset > self._table:
                self._check_positions(int(positions.max()))
        elif self.base.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_made_for(past + T if rows is None else rows.longest, slots, positions)
        return positions

    def _check_made_for(self, longest: int, slots: int | Tensor, positions: Tensor) -> None:
        """Raise when computed positions exceed those the model supports: training would silently use them."""
        made_for = computed_positions(self.base.config.get_text_config())
        most = slots if isinstance(slots, int) else int(slots.max())
        if made_for is None or longest + most <= made_for or int(positions.max()) < made_for:
            return
        raise ValueError(
            f"prefix and tokens need {int(positions.max()) + 1} positions, the model was made for {made_for} "
            f"(max_position_embeddings): cut rows to {made_for - most} tokens, with max_length={made_for - most} of "
            "softkv.Trainer"
        )

    def _check_positions(self, last: int) -> None:
        assert self._table is not None
        if last >= self._table:
            raise ValueError(
                f"prefix and tokens need positions up to {last}, but the model's learned position table ends at "
                f"{self._table - 1}: use a shorter prefix or shorter rows"
            )


def _of_steps(context: SoftContext, kwargs: dict[str, Any]) -> dict[Any, Any] | None:
    """Where calls of attention are kept for further steps of a cache whose rows have one prefix, or each its own."""
    state = CacheState.of(kwargs.get("past_key_values"))
    alike = context.index is None and context.lengths is None and isinstance(context.window_covers, bool)
    return state.steps if state is not None and alike and context.encoder is None else None


def computed_positions(config: Any) -> int | None:
    """How many positions a model that computes them was made for, None where its config does not say."""
    made_for = getattr(config, "max_position_embeddings", None)
    if not isinstance(made_for, int) or made_for < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in (rope, *rope.values()) if isinstance(each, dict)]
    stretched = [each.get("factor") or 1.0 for each in kinds if each.get("rope_type") in ("linear", "dynamic")]
    return int(made_for * max(stretched, default=1.0))


def _raised_in(package: str, error: Exception) -> bool:
    """Whether an error was raised in a package of softkv's, in its own words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(package)


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
