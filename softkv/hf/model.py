"""`attach` and `SoftModel`: a soft prompt on a frozen transformers model.

`SoftModel.forward` puts soft tokens into the rows; pre-hooks inside the decoder (`softkv.hf.hooks`) add the prefix and
move the positions behind it. `generate` is the base's own, entered through the same hooks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf.context import SoftContext
from softkv.hf.frozen import FrozenBase, Original
from softkv.hf.generation.cache_state import Filled, check_contiguous, past_length
from softkv.hf.generation.prompts import Prompts, lengthened, mask_of, pad_id
from softkv.hf.generation.real_tokens import generating
from softkv.hf.hooks import Call, DecoderHooks
from softkv.hf.inner import inside, say_prompt_lengths
from softkv.hf.layout import (
    Insertion,
    Lines,
    in_order,
    keep_in,
    left_order,
    packed_positions,
    rows_of,
    scattered,
)
from softkv.hf.learned import leave_frozen, miss_nothing_frozen
from softkv.hf.prefixes import SoftRows, check_known
from softkv.methods.base import BaseShape, Method, SoftPrompt
from softkv.methods.p_tuning_v2 import matrices_of
from softkv.prefix import Prefix
from softkv.ranges import named

_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_NOT_PAGED = (
    "continuous batching runs only attention that transformers names itself, which knows no prefix: use generate with "
    "a padded batch"
)

FIRST = "default"  # the name of the adapter that a model is attached with


def attach(
    model: Any, method: Method, *, tokenizer: Any = None, backend: str | None = None, head_once: bool = True
) -> SoftModel:
    """Puts a soft prompt on a transformers causal language model and freezes the model.

    Args:
        model: a causal LM whose attention goes through transformers' attention interface.
        method: `PromptTuning`, `PTuning`, `PrefixTuning` or `PTuningV2`.
        tokenizer: the model's tokenizer, needed for inits from a text.
        backend: of `softkv.prefix_attention`; None chooses by device.
        head_once: run soft tokens that stand before every row once for the batch. False puts them into
            every row of a forward with `use_cache=False`: the same results, slower (to measure by how much).

    Returns:
        A `SoftModel`; its only trainable parameters are the method's, in fp32.

    Raises:
        ValueError: when the model can't be reached through the attention interface, takes no position_ids or does not
            count them from 0, is an encoder-decoder, or its layers don't fit the method (a bidirectional encoder has
            no place for soft tokens but in a template).
    """
    return SoftModel(model, method, tokenizer=tokenizer, backend=backend, head_once=head_once)


class SoftModel(nn.Module):
    """A frozen causal LM with a soft prompt, or several. Made by `softkv.attach`; anything it lacks is asked of the
    base.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by its name; that of `attach` is "default".
        active_adapter: the name of the adapter that calls without `adapter_names` use.
    """

    _keys_to_ignore_on_save = None
    _hf_peft_config_loaded = True  # transformers trains quantised models only where adapters are on them

    def __init__(
        self,
        model: Any,
        method: Method,
        *,
        tokenizer: Any = None,
        backend: str | None = None,
        head_once: bool = True,
    ) -> None:
        super().__init__()
        _check_base(model)
        self.base = model
        self.backend = backend
        self.head_once = head_once
        self._enabled = True
        self.adapters = nn.ModuleDict()
        self.active_adapter = FIRST
        self._heads: dict[str, tuple[Any, Prefix]] = {}  # remembered while parameters stay
        self._bank: tuple[Any, SoftContext] | None = None
        self._original: Original | None = Original.freeze(model)
        self._hooks = DecoderHooks(model, backend)
        try:
            blocks = self._hooks.probe()
            self._windowed = any(captured.window is not None for captured in blocks)
            self._causal = all(captured.causal for captured in blocks)
            self._original.silence_dropout([captured.block for captured in blocks])
            self._frozen = FrozenBase(model, [captured.key for captured in blocks], tokenizer)
            self.training = model.training
            self.register_state_dict_post_hook(leave_frozen)
            self.register_load_state_dict_post_hook(miss_nothing_frozen)
            self.register_forward_pre_hook(say_prompt_lengths, with_kwargs=True)
            self.add_adapter(FIRST, method)
        except BaseException:
            self.detach()
            raise

    # Adapters --------------------------------------------------------------------------------------------------------

    @property
    def soft(self) -> SoftPrompt:
        """The learned parameters of the active adapter."""
        return cast(SoftPrompt, self.adapters[self.active_adapter])

    @property
    def method(self) -> Method:
        """The config that built the active adapter, with its length resolved."""
        return self.soft.config

    @property
    def base_shape(self) -> BaseShape:
        """The sizes of the base that decide the shapes of learned parameters."""
        return self._frozen.shape

    def add_adapter(
        self, name: str, adapter: Method | Prefix | str | os.PathLike[str], *, tokenizer: Any = None
    ) -> None:
        """Adds a soft prompt beside those that are there. The active one stays active.

        Args:
            name: a new name, of letters, digits, spaces, "_" and "-".
            adapter: a method, which is built; the folder of a saved adapter (or what else `softkv.load` finds one by);
                or a prefix of one row, `[L or 1, 1, G, P, D]`, which is learned on as `PTuningV2`.
            tokenizer: of the base, for an init from a text; None takes that of `attach`.

        Raises:
            ValueError: when the name is taken or none, or the adapter does not fit the base. Nothing is added then.
            TypeError: when the adapter is none of these.
            FileNotFoundError: when the folder holds no adapter.
        """
        if self._original is None:
            raise RuntimeError("this soft prompt was detached from its model: attach it again")
        if name in self.adapters:
            raise ValueError(f"this model already has an adapter {name!r}: delete it first, or choose another name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w -]*", name) or hasattr(self.adapters, name):
            raise ValueError(
                'the name of an adapter expects letters, digits, spaces, "_" and "-", and must be no attribute of '
                f"nn.ModuleDict, got {name!r}"
            )
        frozen = self._frozen if tokenizer is None else self._frozen.with_tokenizer(tokenizer)
        if isinstance(adapter, Prefix):
            soft: SoftPrompt = matrices_of(adapter, frozen.shape)
        elif isinstance(adapter, Method):
            soft = adapter.build(frozen)
        elif not isinstance(adapter, str | os.PathLike):
            raise TypeError(
                f"an adapter expects a method such as PTuningV2(length=16), a prefix or a folder, got {adapter!r}"
            )
        else:
            from softkv.io import checkpoint

            soft = checkpoint.saved(self.base, *checkpoint.prompt_alone(checkpoint.local(adapter))).build(frozen)
        if not self._causal and (soft.encodes_rows or soft.placement in ("before", "after")):
            raise ValueError(
                f"{type(self.base).__name__} is bidirectional, its rows have no prompt that comes before an answer: "
                "expected PTuning, PrefixTuning or PTuningV2 without an encoder, got "
                f"{type(soft.config).__name__}"
            )
        if soft.encodes_rows:
            self._hooks.hook_blocks()
        self.adapters[name] = soft.to(self.base.device).train(self.training)

    def set_adapter(self, name: str) -> None:
        """Makes an adapter the active one: that of calls without `adapter_names`."""
        check_known(name, self.adapters)
        self.active_adapter = name

    @contextmanager
    def using(self, name: str) -> Iterator[SoftModel]:
        """Within this context an adapter is the active one."""
        active = self.active_adapter
        self.set_adapter(name)
        try:
            yield self
        finally:
            self.active_adapter = active

    def delete_adapter(self, name: str) -> None:
        """Takes an adapter away.

        Raises:
            ValueError: when it is the active one, or there is none of that name.
        """
        check_known(name, self.adapters)
        if name == self.active_adapter:
            raise ValueError(f"adapter {name!r} is the active one: set_adapter(...) another before it is deleted")
        del self.adapters[name]
        self._heads.pop(name, None)
        self._bank = None  # it may hold what is gone

    # What Trainer, pipeline and users ask of a model -----------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            if name in _PAGED:
                raise AttributeError(f"SoftModel has no {name}: {_NOT_PAGED}") from None
            return inside(self, getattr(self.base, name))

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The base's decoder, which gives hidden states with the soft prompt in place when it is called."""
        return inside(self, self.base.get_decoder(*args, **kwargs))

    def get_base_model(self) -> SoftModel:
        """This model: what others would patch or call around a wrapper carries the soft prompt here. The frozen model
        is `base`."""
        return self

    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers' `num_parameters`, what is learned included."""
        from transformers import PreTrainedModel

        return PreTrainedModel.num_parameters(self, only_trainable, exclude_embeddings)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes activations in backward. A prefix needs the non-reentrant kind, transformers' default.

        Raises:
            ValueError: for `use_reentrant=True`.
        """
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        _check_reentrant(kwargs)
        wanted_input_gradients = hasattr(self.base, "_require_grads_hook")
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)
        if not wanted_input_gradients:  # for reentrant checkpoints; here they would only cost layer 0 its backward
            self.base.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

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
        attention implementation, dropout, training mode of every module)."""
        if self._original is not None:
            self._hooks.remove()
            self._original.release(self.base)
            self._original = None
        return self.base

    def get_extra_state(self) -> Tensor:
        """What the values in `state_dict()` mean, as the bytes of a JSON text: any trainer's checkpoint loads by it."""
        from softkv.io.state import described

        return described(self)

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that a state dict is of the same adapters.

        Raises:
            ValueError: when it is of another method or of other settings. Nothing has changed then.
        """
        from softkv.io.state import check_described

        check_described(self, state)

    def save_pretrained(self, save_directory: Any, *, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Writes `softkv_config.json` and `softkv.safetensors`: what an adapter has learned, not the base. Without a
        name, the active one is saved."""
        from softkv.io.checkpoint import save

        with self.using(self.active_adapter if adapter_name is None else adapter_name):
            save(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves what is learned to a repository on the Hugging Face Hub (`softkv.io.checkpoint.push`)."""
        from softkv.io.checkpoint import push

        return push(self, repo_id, **kwargs)

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
        adapter_names: Sequence[str | None] | None = None,
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
            adapter_names: the adapter of each row, packed ones too; None among them is the bare model. Without it, all
                rows have the active one, or those that filled the cache.

        Returns:
            The base's output. Logits are `[B, T, V]`: `logits[:, t]` predicts token t + 1, whatever was inserted.

        Raises:
            ValueError: when adapter_names don't fit the rows or the cache; when training needs the end of the prompts
                and neither labels nor prompt_lengths are given; on prompt_lengths that are not `[B]` integers or, on
                CPU, longer than rows; on `output_attentions`; on positions past a learned position table.
        """
        module = kwargs.pop("softkv_inner", self.base)  # what is run: the base, or that of its modules (`Inner`)
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
            _check_no_names(adapter_names)
            return module(**_given(**batch))
        self._check_options(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("SoftModel expects either input_ids or inputs_embeds")
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        B, T = tokens.shape[:2]
        past = past_length(past_key_values)
        if self.training and past_key_values is None and kwargs.get("use_cache") is None:
            batch["use_cache"] = False  # a cache would only copy every K and V

        rows = rows_of((B, T), attention_mask, position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"))
        columns, split_labels = None, labels  # where the columns given are, when they were moved
        filling = self._windowed and not past and self._caches(batch)
        if filling and attention_mask is not None and scattered(attention_mask):
            # Windows of later tokens will count the columns of the cache: padding goes in front.
            order = left_order(attention_mask)
            columns = order.argsort(1)
            for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
                batch[name] = None if batch[name] is None else in_order(batch[name], order)
            input_ids, attention_mask, position_ids = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
            split_labels = None if labels is None else in_order(labels, order)  # the loss is of the columns given
        lines = Lines.of((B, T), attention_mask, rows, tokens.device)
        soft = self._soft_rows(adapter_names, len(lines.first), past_key_values)
        split = None  # where prompts end, in the forward that reads them
        if soft.reading_prompts and not past:
            if self.training and labels is None and prompt_lengths is None:
                raise ValueError(
                    f"{soft.reading_prompts} must know where each row's prompt ends: give labels (-100 on the prompt) "
                    "or prompt_lengths"
                )
            split = lines.split(split_labels, prompt_lengths)
        heads = not self.head_once and not past and batch.get("use_cache") is False
        in_rows = soft.tokens(len(lines.first), heads=heads)
        k = in_rows.longest if in_rows is not None else 0
        if input_ids is not None:
            self._check_ids(input_ids, soft, lines)
            if in_rows is not None:
                ids = in_rows.in_table(input_ids, lines.line_of_token.view(B, T))
                batch["inputs_embeds"], batch["input_ids"] = self._hooks.embed(ids, in_rows.table), None

        if in_rows is not None and k and not past:
            insertion = Insertion.into(lines, in_rows.place(lines.first, split), in_rows.first, in_rows.block)
            if split is not None:
                split = split - lines.first + insertion.lines.first
            lines = insertion.lines
            if in_rows.ragged and rows is None and attention_mask is None:  # shorter blocks leave padding
                attention_mask = torch.ones(B, T, dtype=torch.long, device=tokens.device)
            batch["inputs_embeds"] = insertion.embeddings(batch["inputs_embeds"], in_rows.table)
            columns = insertion.logits_at if columns is None else insertion.logits_at.gather(1, columns)
            if attention_mask is not None:
                batch["attention_mask"] = insertion.attention_mask(attention_mask)
            if rows is not None:
                rows = replace(rows, cu_seqlens=lines.bounds.to(torch.int32), longest=rows.longest + k)
                batch["position_ids"] = None
            elif position_ids is not None:
                batch["position_ids"] = insertion.positions(position_ids.expand(B, T))
        if columns is not None and module is self.base:
            batch["logits_to_keep"] = keep_in(columns, lines.shape[1], logits_to_keep)
        if not past:
            filled = Filled(T, B, soft.names, batch["attention_mask"])
        else:
            filled = Filled.by(soft, past_key_values)
            batch["attention_mask"] = mask = filled.mask_of(attention_mask, k, (B, past + T))
            if self._windowed and mask is not None:
                check_contiguous(mask, T)
            if position_ids is not None and in_rows is not None:
                batch["position_ids"] = position_ids + torch.tensor(in_rows.block, device=tokens.device)[:, None]
        if rows is not None:
            for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
                batch.pop(key, None)
            if batch["position_ids"] is None:
                batch["position_ids"] = packed_positions(rows, lines.shape[1])

        context = replace(self._context(soft, heads=heads), rows=rows)
        if soft.encodes:
            prompts = None if split is None else lines.prompts(split)
            memory = filled.kv if past or self._caches(batch) else None
            context = self._hooks.encoding(context, soft, prompts, memory, filled.order)
        return_dict = batch.pop("return_dict", None)
        with self._hooks.active(Call(context, soft, positions_given=position_ids is not None)):
            output = module(**_given(**batch), return_dict=True)
        if not past and output.get("past_key_values") is not None:
            filled.leave_with(output.past_key_values)
        if columns is not None:
            at = columns[:, :, None]
            if output.get("last_hidden_state") is not None:
                output["last_hidden_state"] = output["last_hidden_state"].take_along_dim(at, 1)
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(states.take_along_dim(at, 1) for states in output["hidden_states"])
        return output.to_tuple() if return_dict is False else output

    def _caches(self, batch: dict[str, Any]) -> bool:
        """Whether the base will keep a cache in this forward."""
        if self.training and self.base.is_activation_checkpointing:
            return False
        use_cache = batch.get("use_cache")
        default = (
            getattr(self.base.config.get_text_config(), "use_cache", False) or batch["past_key_values"] is not None
        )
        return default if use_cache is None else use_cache

    # Generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's `generate` with the soft prompt in place; every row is a whole prompt.

        Args:
            inputs / input_ids: int64 `[B, T]`; negative ids are a template's soft tokens. Or `inputs_embeds`.
            generation_config: transformers' `GenerationConfig`; the base's own by default.
            attention_mask: `[B, T]`, padding on either side.
            adapter_names: the adapter of each row, as in `forward`.
            **kwargs: whatever the base's `generate` takes.

        Returns:
            What the base returns. Sequences begin with the ids given; soft tokens come back as padding.
        """
        ids = inputs if input_ids is None else input_ids
        kwargs |= _given(generation_config=generation_config)
        if not self._enabled:
            _check_no_names(adapter_names)
            return self.base.generate(
                **_given(inputs=ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds), **kwargs
            )
        self._check_options(kwargs)
        if ids is None and inputs_embeds is None:
            raise ValueError("SoftModel.generate expects input_ids or inputs_embeds")
        config = generation_config or self.base.generation_config
        _check_ways(
            {name: kwargs.get(name, getattr(config, name)) for name in ("cache_implementation", "token_healing")}
        )
        prompt = ids if ids is not None else inputs_embeds
        assert prompt is not None
        cache = kwargs.get("past_key_values")
        past = past_length(cache)
        soft = self._soft_rows(adapter_names, len(prompt), cache)
        in_rows = soft.tokens(len(prompt), heads=False)
        k = in_rows.longest if in_rows is not None else 0
        if k and past:
            raise ValueError(
                "PromptTuning puts its block after the prompt: generate expects an empty cache, got a filled one"
            )
        if ids is not None:
            self._check_ids(ids, soft, Lines.of((len(ids), ids.shape[1]), None, None, ids.device))
            if attention_mask is None:
                attention_mask = mask_of(ids, kwargs, config)
        prompts = Prompts.prepare(
            ids, inputs_embeds, attention_mask, soft=in_rows, pad=pad_id(kwargs, config), past=past
        )
        if past:
            self._go_on(Filled.by(soft, cache), cache, prompts, past)
        elif cache is not None:
            Filled.forget(cache)
        options = lengthened(kwargs, config, k)
        if options.get("streamer") is not None:
            options["streamer"] = prompts.streamer(options["streamer"])
        table = None if in_rows is None else in_rows.table
        call = Call(self._context(soft, heads=False), soft, prompts, table)
        with self._hooks.active(call), generating(self, prompts.shown):
            output = self.base.generate(
                **_given(inputs=prompts.ids, attention_mask=prompts.mask, inputs_embeds=prompts.embeds), **options
            )
        return prompts.with_given(output)

    def _go_on(self, filled: Filled, cache: Any, prompts: Prompts, past: int) -> None:
        """Checks that prompts go on from what a cache holds."""
        mask = prompts.mask
        tokens = prompts.ids if prompts.ids is not None else prompts.embeds
        assert tokens is not None
        filled.unread = (tokens if mask is None else mask).shape[1] - past
        if mask is not None:
            filled.check_same_rows(mask)
            if self._windowed:
                check_contiguous(mask, mask.shape[1] - past)
        filled.leave_with(cache)

    # What the soft prompt gives, and what it takes --------------------------------------------------------------------

    def _soft_rows(self, names: Sequence[str | None] | None, rows: int, cache: Any) -> SoftRows:
        """The soft prompts of `rows` rows: those named, else those that the cache gone on from was filled with, else
        the active one."""
        filled = Filled.of(cache) if past_length(cache) else None
        left = None
        if filled is not None and filled.adapters:
            left = SoftRows.of(filled.adapters, self.adapters, filled.order_of_adapters)
        if names is not None:
            if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
                raise TypeError(f"adapter_names expects a list of names (None: the bare model), got {names!r}")
            if len(names) != rows:
                raise ValueError(f"adapter_names expects a name for each of the {rows} rows, got {len(names)}")
            read = list(names) if left is None else left.names_of(rows)
            if read != list(names):
                raise ValueError(f"the cache was filled with the adapters {read}, got others: {list(names)}")
        return left or SoftRows.of(names or (self.active_adapter,), self.adapters)

    def _context(self, soft: SoftRows, *, heads: bool) -> SoftContext:
        """The prefixes of a forward pass: learned, or the K/V of soft tokens that stand before the input (unless these
        are put into the rows as `heads`)."""
        remember = len(soft.names) > 1 and not torch.is_grad_enabled() and not self.training
        state = (soft.names, soft.order, heads, [each.version() for each in soft.softs.values()]) if remember else None
        if remember and self._bank is not None and self._bank[0] == state:
            return self._bank[1]
        prefixes = {}
        with named("prefix"):
            for name, each in soft.softs.items():
                before = each.placement == "before"
                prefix = each.prefix() if not before else None if heads else self._head_prefix(name, each)
                if prefix is not None:
                    prefixes[name] = prefix.to(dtype=self.base.dtype)
            context = soft.context(prefixes, len(self._hooks.order), self.base.device)
        context = replace(context, backend=self.backend)
        if remember:
            self._bank = state, context
        return context

    def _head_prefix(self, name: str, soft: SoftPrompt) -> Prefix:
        """The K/V of the soft tokens that stand before every row: in a causal decoder they don't depend on the rows,
        so they are run once, at batch 1, with gradients."""
        remember = not torch.is_grad_enabled() and not self.training
        state = soft.version()
        if remember and name in self._heads and self._heads[name][0] == state:
            return self._heads[name][1]
        soft_tokens = soft.soft_tokens()
        assert soft_tokens is not None
        dtype = self.base.dtype
        with named("head once"):
            blocks = self._hooks.capture(inputs_embeds=soft_tokens[None].to(dtype))
        prefix = Prefix.from_layers(
            [block.key.to(dtype) for block in blocks], [block.value.to(dtype) for block in blocks]
        )
        self._heads.pop(name, None)
        if remember:
            self._heads[name] = state, prefix
        return prefix

    def _apply(self, *args: Any, **kwargs: Any) -> SoftModel:
        self._heads, self._bank = {}, None
        return super()._apply(*args, **kwargs)

    def _check_ids(self, ids: Tensor, soft: SoftRows, lines: Lines) -> None:
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            return
        if not bool((ids < 0).any()):
            if self.training and torch.is_grad_enabled() and soft.softs and soft.inline:
                raise ValueError(
                    "PTuning learns soft tokens that its rows hold as negative ids, but input_ids hold none, so "
                    "nothing would be learned: make the rows with method.encode(tokenizer, ...)"
                )
            return
        placed = {name: int(each.config.length) for name, each in soft.softs.items() if each.placement == "inline"}  # type: ignore[attr-defined]
        of_token = torch.tensor(soft.of_rows(len(lines.first), placed, 0))[lines.line_of_token].view_as(ids)
        wrong = (ids < -of_token).flatten()
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            row = int(lines.line_of_token[at])
            kinds = {name: type(each.config).__name__ for name, each in soft.softs.items()}
            raise ValueError(
                f"input_ids hold the soft token id {int(ids.flatten()[at])} in row {row}, but "
                f"{soft.of_rows(len(lines.first), kinds, 'the bare model')[row]} places {int(of_token.flatten()[at])} "
                "soft tokens by id"
            )

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions") or getattr(self.base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs attention weights, which softkv never forms: detach the soft prompt or "
                "leave it off"
            )
        if self.training and self.base.is_activation_checkpointing:
            if self._hooks.order.repeats:
                raise ValueError(
                    f"{type(self.base).__name__} runs an attention module several times a pass, which a recomputed "
                    "pass can't tell apart: gradient_checkpointing_disable() it"
                )
            for module in self._hooks.decoder.modules():
                _check_reentrant(getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}))


def _check_base(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"softkv.attach expects a transformers model, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"softkv.attach expects a causal decoder, got the encoder-decoder {type(model).__name__}")
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None:
        raise ValueError(f"{type(model).__name__} uses chunked attention, which softkv attention does not offer")


def _check_ways(options: dict[str, Any]) -> None:
    """Refuses ways to generate that would leave the soft prompt out."""
    if options["cache_implementation"] == "paged":
        raise ValueError(f'SoftModel.generate has no cache_implementation="paged": {_NOT_PAGED}')
    if options["token_healing"]:
        raise ValueError(
            "token_healing rewrites prompts inside generate, soft tokens too: heal them first, with "
            "heal_tokens(input_ids, tokenizer), and leave it out here"
        )


def _check_no_names(names: Any) -> None:
    if names is not None:
        raise ValueError("a disabled SoftModel answers as the bare model: leave adapter_names out")


def _check_reentrant(checkpointing: dict[str, Any]) -> None:
    if checkpointing.get("use_reentrant"):
        raise ValueError(
            "softkv needs non-reentrant gradient checkpointing: expected use_reentrant=False, got True (reentrant "
            "checkpoints can't carry the gradient of a prefix)"
        )


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
