"""`attach` and `SoftModel`: a soft prompt on a frozen transformers model.

`SoftModel.forward` puts soft tokens into the rows; a keyword pre-hook on the frozen decoder adds the prefix (as the
keyword `softkv_prefix`) and moves the positions behind it. `generate` is the base's own, entered through the same hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.hf.context import Captured, LayerKV, RowEncoder, RowPrompts, SoftContext
from softkv.hf.frozen import FrozenBase, Original
from softkv.hf.rows import Insertion, Lines, left_padded, packed_positions, rows_of, token_positions
from softkv.methods.base import Method, SoftPrompt
from softkv.prefix import Prefix, evaluating


@dataclass
class _Call:
    """One `forward` or `generate` under way, as the pre-hooks see it.

    Attributes:
        context: what goes to the attention blocks.
        soft_tokens, soft_at: in `generate`, the soft embeddings `[k, C]` and `[B, T]` which of them stands in each
            column of the prompt (-1: none).
        prompts: encoder mode, where the prompts lie in this forward.
        prompt_mask: encoder mode in `generate`, the real tokens `[B, T]` of the prompts.
        prefilled: whether the whole prompt has been read.
    """

    context: SoftContext
    soft_tokens: Tensor | None = None
    soft_at: Tensor | None = None
    prompts: RowPrompts | None = None
    prompt_mask: Tensor | None = None
    prefilled: bool = False


def attach(model: Any, method: Method, *, tokenizer: Any = None, backend: str | None = None) -> SoftModel:
    """Puts a soft prompt on a transformers causal language model and freezes the model.

    Args:
        model: a causal LM whose attention goes through transformers' attention interface.
        method: `PromptTuning`, `PTuning`, `PrefixTuning` or `PTuningV2`.
        tokenizer: the model's tokenizer, needed for inits from a text.
        backend: of `softkv.prefix_attention`; None chooses by device.

    Returns:
        A `SoftModel`; its only trainable parameters are the method's, in fp32.

    Raises:
        ValueError: when the model can't be reached through the attention interface, is an encoder-decoder, or its
            layers don't fit the method.
    """
    return SoftModel(model, method, tokenizer=tokenizer, backend=backend)


class SoftModel(nn.Module):
    """A frozen causal LM with a soft prompt. Made by `softkv.attach`; anything it lacks is asked of the base.

    Attributes:
        base: the frozen model.
        soft: the learned parameters (`SoftPrompt`).
        method: the config that built them.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, model: Any, method: Method, *, tokenizer: Any = None, backend: str | None = None) -> None:
        super().__init__()
        _check_base(model)
        self.base = model
        self.backend = backend
        self._calls: list[_Call] = []
        self._enabled = True
        self._table = _learned_positions(model)
        self._memories: WeakKeyDictionary[Any, dict[int, LayerKV]] = WeakKeyDictionary()
        self._head: tuple[Any, Prefix] | None = None
        self._original: Original | None = Original.freeze(model)
        self._hooks = [self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)]
        try:
            self._blocks = self._probe()
            self._original.silence_dropout([captured.block for captured in self._blocks.values()])
            keys = {layer: captured.key for layer, captured in self._blocks.items()}
            self.soft: SoftPrompt = method.build(FrozenBase(model, keys, tokenizer)).to(model.device)
        except BaseException:
            self.detach()
            raise
        self.method = self.soft.config  # its length is known now
        if self.soft.encodes_rows:
            self._hooks += [
                captured.block.register_forward_pre_hook(self._enter_block, with_kwargs=True)
                for captured in self._blocks.values()
            ]
        self.train(model.training)

    # What Trainer, pipeline and users ask of a model -----------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    @property
    def _decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes activations in backward. A learned prefix needs the non-reentrant kind, transformers' default."""
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if options["use_reentrant"]:
            raise ValueError(
                "softkv needs non-reentrant gradient checkpointing: expected use_reentrant=False, got True "
                "(reentrant checkpoints can't carry the gradient of a prefix)"
            )
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    @contextmanager
    def disabled(self) -> Iterator[SoftModel]:
        """Within this context the model answers as the bare base does."""
        enabled, self._enabled = self._enabled, False
        try:
            yield self
        finally:
            self._enabled = enabled

    def detach(self) -> Any:
        """Takes the soft prompt off and returns the base; the last one off restores the base exactly (requires_grad,
        attention implementation, dropout)."""
        if self._original is not None:
            for hook in self._hooks:
                hook.remove()
            self._original.release(self.base)
            self._original = None
        return self.base

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes `softkv_config.json` and `softkv.safetensors`: what is learned, not the base."""
        from softkv.checkpoint import save

        save(self, save_directory, **kwargs)

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The base's forward with the soft prompt in place.

        Args:
            input_ids: int64 `[B, T]`; negative ids are a template's soft tokens. Or `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, T]` padding mask (padding on either side), None for no padding or packed rows.
            position_ids: `[B, T]` without the prefix; `[1, N]` restarting ids mark packed rows (or `cu_seq_lens_q`).
            labels: `[B, T]`, -100 where a token is not an answer; they also tell where a row's prompt ends.
            prompt_lengths: `[B]` tokens of each row's prompt, where there are no labels.
            logits_to_keep: as in transformers, in columns of the batch given.

        Returns:
            The base's output. Logits are `[B, T, V]`: `logits[:, t]` predicts token t + 1, whatever was inserted.

        Raises:
            ValueError: when training needs the end of the prompts and neither labels nor prompt_lengths are given;
                on `output_attentions`; on positions past a learned position table.
        """
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            **kwargs,
        }
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            batch["logits_to_keep"] = logits_to_keep
        if not self._enabled:
            return self.base(**{key: value for key, value in batch.items() if value is not None})
        self._check_outputs(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("SoftModel expects either input_ids or inputs_embeds")
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        B, T = tokens.shape[:2]

        rows = rows_of((B, T), attention_mask, position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"))
        lines = Lines.of((B, T), attention_mask, rows, tokens.device)
        resumed = _past_length(past_key_values) > 0
        inserted = self.soft.placement == "after" and not resumed
        split = None
        if (inserted or self.soft.encodes_rows) and not resumed:
            if self.training and labels is None and prompt_lengths is None:
                raise ValueError(
                    f"{type(self.method).__name__} must know where each row's prompt ends: give labels (-100 on the "
                    "prompt) or prompt_lengths"
                )
            split = lines.split(labels, prompt_lengths)

        soft_tokens = self.soft.soft_tokens() if self.soft.placement in ("after", "inline") else None
        insertion = None
        if soft_tokens is not None and input_ids is not None:
            batch["inputs_embeds"], batch["input_ids"] = self._embed(input_ids, soft_tokens), None
        elif input_ids is not None:
            self._check_ids(input_ids, 0)
        if inserted and soft_tokens is not None and split is not None:
            insertion = Insertion.into(lines, split, len(soft_tokens))
            batch["inputs_embeds"] = insertion.embeddings(batch["inputs_embeds"], soft_tokens)
            if attention_mask is not None:
                batch["attention_mask"] = insertion.attention_mask(attention_mask)
            batch["logits_to_keep"] = insertion.keep(logits_to_keep)
            lines = insertion.lines
            if rows is not None:
                rows = replace(rows, cu_seqlens=lines.bounds.to(torch.int32), longest=rows.longest + len(soft_tokens))
                batch["position_ids"] = None
            elif position_ids is not None:
                batch["position_ids"] = insertion.positions(position_ids.expand(B, T))
        if rows is not None:
            for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
                batch.pop(key, None)
            if batch["position_ids"] is None:
                batch["position_ids"] = packed_positions(rows, lines.shape[1])

        call = _Call(replace(self._context(), rows=rows))
        if self.soft.encodes_rows and split is not None:
            call.prompts = lines.prompts(split)
        with self._active(call):
            output = self.base(**{key: value for key, value in batch.items() if value is not None})
        if insertion is not None and output.get("hidden_states") is not None:
            at = insertion.logits_at[:, :, None]
            output["hidden_states"] = tuple(states.take_along_dim(at, 1) for states in output["hidden_states"])
        return output

    # Generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's `generate` with the soft prompt in place; every row is a whole prompt.

        Args:
            inputs / input_ids: int64 `[B, T]`; negative ids are a template's soft tokens. Or `inputs_embeds`.
            attention_mask: `[B, T]`, padding on either side.
            **kwargs: whatever the base's `generate` takes.

        Returns:
            What the base returns. Sequences begin with the ids given; soft tokens come back as padding.
        """
        ids = inputs if input_ids is None else input_ids
        if not self._enabled:
            return self.base.generate(
                **_given(inputs=ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds), **kwargs
            )
        self._check_outputs(kwargs)
        if ids is None and inputs_embeds is None:
            raise ValueError("SoftModel.generate expects input_ids or inputs_embeds")
        if attention_mask is None and ids is not None:
            attention_mask = self._mask_of(ids, kwargs)
        given = ids
        padded_right = attention_mask is not None and not bool(attention_mask[:, -1].all())
        if attention_mask is not None and padded_right:
            mask = attention_mask
            if ids is not None:
                ids, attention_mask = left_padded(ids, mask)
            if inputs_embeds is not None:
                inputs_embeds, attention_mask = left_padded(inputs_embeds, mask)

        call = _Call(self._context())
        soft_tokens = self.soft.soft_tokens()
        k = len(soft_tokens) if soft_tokens is not None and self.soft.placement == "after" else 0
        if soft_tokens is not None and self.soft.placement in ("after", "inline"):
            call.soft_tokens = soft_tokens
            if inputs_embeds is not None:
                block = soft_tokens[:k].to(inputs_embeds.dtype).expand(len(inputs_embeds), -1, -1)
                inputs_embeds = torch.cat([inputs_embeds, block], 1)
            if ids is not None:
                self._check_ids(ids, len(soft_tokens) if self.soft.placement == "inline" else 0)
                call.soft_at = F.pad((-ids - 1).clamp(min=-1), (0, k))
                call.soft_at[:, ids.shape[1] :] = torch.arange(k, device=ids.device)
                # A soft token is shown to logits processors as a token that the row holds anyway.
                shown = ids.clamp(min=0).amax(1, keepdim=True)
                ids = F.pad(torch.where(ids < 0, shown, ids), (0, k))
                ids[:, ids.shape[1] - k :] = shown
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, k), value=1)
            if k and kwargs.get("max_length") is not None:
                kwargs["max_length"] += k
        elif ids is not None:
            self._check_ids(ids, 0)
        if self.soft.encodes_rows:
            tokens = ids if ids is not None else inputs_embeds
            assert tokens is not None
            ones = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            call.prompt_mask = ones if attention_mask is None else attention_mask
        with self._active(call):
            output = self.base.generate(
                **_given(inputs=ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds), **kwargs
            )
        return self._with_given(output, given, k, padded_right, kwargs)

    def _with_given(self, output: Any, given: Tensor | None, k: int, padded_right: bool, kwargs: dict[str, Any]) -> Any:
        """The output's sequences with the ids that were given in front."""
        if given is None or not (k or padded_right or bool((given < 0).any())):
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        repeats = len(sequences) // len(given)
        front = torch.where(given < 0, self._pad_id(kwargs), given).repeat_interleave(repeats, 0)
        sequences = torch.cat([front, sequences[:, given.shape[1] + k :]], 1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _pad_id(self, kwargs: dict[str, Any]) -> int:
        config = kwargs.get("generation_config") or self.base.generation_config
        candidates = (kwargs.get("pad_token_id"), config.pad_token_id, kwargs.get("eos_token_id"), config.eos_token_id)
        found = next((candidate for candidate in candidates if candidate is not None), 0)
        return found[0] if isinstance(found, list) else int(found)

    def _mask_of(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The padding mask that transformers infers: pad tokens are padding unless they may end a text too."""
        config = kwargs.get("generation_config") or self.base.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        eos = kwargs.get("eos_token_id", config.eos_token_id)
        ends = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(ids)
        return (ids != pad).long()

    # Inside the base -------------------------------------------------------------------------------------------------

    @contextmanager
    def _active(self, call: _Call) -> Iterator[None]:
        if self._original is None:
            raise RuntimeError("this soft prompt was detached from its model: attach it again")
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()

    def _context(self) -> SoftContext:
        """The prefix of a forward pass: learned, or the K/V of soft tokens that stand before the input."""
        if self.soft.placement == "before":
            prefix: Prefix | None = self._head_prefix()
        else:
            prefix = self.soft.prefix()
        if prefix is None:
            return SoftContext(backend=self.backend)
        prefix = prefix.to(dtype=self.base.dtype)
        return SoftContext.of_prefix(prefix, len(self._blocks), backend=self.backend)

    def _head_prefix(self) -> Prefix:
        """The K/V of the soft tokens that stand before every row: in a causal decoder they don't depend on the rows,
        so they are run once, at batch 1, with gradients."""
        frozen = not torch.is_grad_enabled() and not self.training
        state = tuple((id(parameter), parameter._version) for parameter in self.soft.parameters())
        if frozen and self._head is not None and self._head[0] == state:
            return self._head[1]
        soft_tokens = self.soft.soft_tokens()
        assert soft_tokens is not None
        captured = self._capture(inputs_embeds=soft_tokens[None].to(self.base.dtype))
        layers = [captured[layer] for layer in sorted(captured)]
        prefix = Prefix.from_layers([block.key for block in layers], [block.value for block in layers])
        self._head = (state, prefix) if frozen else None
        return prefix

    def _capture(self, **inputs: Tensor) -> dict[int, Captured]:
        """What reaches the attention blocks in a forward pass of the bare decoder."""
        context = SoftContext(backend=self.backend, capture={})
        with self._active(_Call(context)):
            self._decoder(**inputs, use_cache=False)
        assert context.capture is not None
        return context.capture

    def _probe(self) -> dict[int, Captured]:
        """Runs one token through the decoder to see its attention blocks."""
        name = type(self.base).__name__
        try:
            with torch.no_grad(), evaluating(self.base):
                blocks = self._capture(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.base.device))
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise
            blocks = {}
        if not blocks:
            raise ValueError(
                f"{name} does not pass keywords through to transformers' attention interface, so softkv can't reach "
                "its attention"
            )
        return dict(sorted(blocks.items()))

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keyword pre-hook of the decoder: soft embeddings, positions behind the prefix, and the prefix."""
        if not self._calls:
            return None
        call = self._calls[-1]
        if args:
            kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids")
        if ids is not None and call.soft_at is not None and call.soft_tokens is not None:
            kwargs["inputs_embeds"] = self._embed_columns(ids, call, cache)
            kwargs["input_ids"] = None
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else ids
        B, T = tokens.shape[:2]
        context = call.context
        if context.capture is None and self.soft.encodes_rows:
            context = self._encoding(context, call, kwargs, (B, T))
        offset = self._slots(context, B)
        if offset is not None:
            positions = kwargs.get("position_ids")
            if positions is None:
                past = cache.get_seq_length() if cache is not None else 0
                mask = kwargs.get("attention_mask")
                positions = token_positions(mask if isinstance(mask, Tensor) else None, (B, T), past, tokens.device)
            kwargs["position_ids"] = positions = positions + offset
            if self._table is not None and int(positions.max()) >= self._table:
                raise ValueError(
                    f"prefix and tokens need positions up to {int(positions.max())}, but the model's learned position "
                    f"table ends at {self._table - 1}: use a shorter prefix or shorter rows"
                )
        call.prefilled = True
        kwargs["softkv_prefix"] = context
        return (), kwargs

    def _enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keyword pre-hook of an attention block in encoder mode: makes the block's K/V from what enters it. It runs
        inside a checkpointed region, so it is recomputed with it."""
        context = kwargs.get("softkv_prefix")
        if not isinstance(context, SoftContext) or context.encoder is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        layer: int = block.layer_idx  # type: ignore[assignment]
        return args, kwargs | {"softkv_prefix": context.with_layer(layer, context.encoder(layer, hidden))}

    def _encoding(
        self, context: SoftContext, call: _Call, kwargs: dict[str, Any], shape: tuple[int, int]
    ) -> SoftContext:
        """The context with what encodes each row's prompt, or with what an earlier forward of this cache encoded."""
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache"):
            from transformers import DynamicCache

            cache = kwargs["past_key_values"] = DynamicCache(config=self.base.config)
        memory = None if cache is None else self._memories.setdefault(cache, {})
        prompts = call.prompts
        if not memory and prompts is None:
            if call.prompt_mask is None or shape[1] < call.prompt_mask.shape[1]:
                raise ValueError(
                    "encoder-mode P-tuning v2 reads the whole prompt in the first forward of a cache: got a cache "
                    "filled without it, or a prompt in chunks"
                )
            mask = call.prompt_mask.repeat_interleave(shape[0] // len(call.prompt_mask), 0)
            mask = F.pad(mask, (0, shape[1] - mask.shape[1]))
            lines = Lines.of(shape, mask, None, mask.device)
            prompts = lines.prompts(lines.last)
        if prompts is None:
            empty = torch.zeros(0, 0, dtype=torch.long)
            prompts = RowPrompts(empty, empty[:, 0])
        return replace(context, encoder=RowEncoder(self.soft.row_prefix, prompts, memory))

    def _slots(self, context: SoftContext, B: int) -> int | Tensor | None:
        """How far the prefix moves the positions `[B, T]`: an int, or a tensor that broadcasts against them."""
        if context.encoder is not None:
            return int(self.method.length)  # type: ignore[attr-defined]
        if context.layers is None:
            return None
        k = context.layers[0][0]
        if context.lengths is None and context.index is None:
            return k.shape[2]
        lengths = context.lengths if context.lengths is not None else torch.full(k.shape[:1], k.shape[2]).to(k.device)
        index = context.index if context.index is not None else torch.arange(len(k), device=k.device)
        per_row = torch.where(index >= 0, lengths[index.clamp(min=0)], 0)
        if context.rows is not None:
            return torch.repeat_interleave(per_row, context.rows.cu_seqlens.diff().long())[None]
        return per_row.repeat_interleave(B // len(per_row))[:, None]

    # Soft embeddings -------------------------------------------------------------------------------------------------

    def _embed(self, ids: Tensor, soft_tokens: Tensor) -> Tensor:
        """Embeddings `[B, T, C]` of ids, with soft token -i-1 where an id i is negative (inline only)."""
        embeddings = self.base.get_input_embeddings()
        if self.soft.placement != "inline":
            self._check_ids(ids, 0)
            return embeddings(ids)
        self._check_ids(ids, len(soft_tokens))
        soft = soft_tokens[(-ids - 1).clamp(min=0)]
        embeds = embeddings(ids.clamp(min=0))
        return torch.where((ids < 0)[:, :, None], soft.to(embeds.dtype), embeds)

    def _embed_columns(self, ids: Tensor, call: _Call, cache: Any) -> Tensor:
        """Embeddings of the next columns of a generation, soft tokens where the prompt has them."""
        embeds = self.base.get_input_embeddings()(ids)
        if call.prefilled and cache is not None and ids.shape[1] == 1:
            return embeds
        assert call.soft_at is not None and call.soft_tokens is not None
        past = _past_length(cache)
        at = call.soft_at[:, past : past + ids.shape[1]]
        if not at.numel():
            return embeds
        at = F.pad(at, (0, ids.shape[1] - at.shape[1]), value=-1).repeat_interleave(len(ids) // len(at), 0)
        return torch.where((at >= 0)[:, :, None], call.soft_tokens[at.clamp(min=0)].to(embeds.dtype), embeds)

    def _check_ids(self, ids: Tensor, soft_tokens: int) -> None:
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
            return
        lowest = int(ids.min())
        if lowest < -soft_tokens:
            raise ValueError(
                f"input_ids hold the soft token id {lowest}, but {type(self.method).__name__} places {soft_tokens} soft "
                "tokens by id"
            )

    def _check_outputs(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions") or getattr(self.base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs attention weights, which softkv never forms: detach the soft prompt or "
                "leave it off"
            )


def _check_base(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"softkv.attach expects a transformers model, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"softkv.attach expects a causal decoder, got the encoder-decoder {type(model).__name__}")
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None:
        raise ValueError(f"{type(model).__name__} uses chunked attention, which softkv attention does not offer")


def _learned_positions(model: Any) -> int | None:
    """The number of positions of a learned table, or None for models that compute positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in (
            "wpe",
            "embed_positions",
            "position_embeddings",
        ):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
