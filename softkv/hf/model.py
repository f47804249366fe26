"""`PromptedModel`: a frozen transformers model with soft prompts.

`forward` inserts soft tokens into the rows (`softkv.hf.inputs`); pre-hooks inside the decoder (`softkv.hf.hooks`) add
the prefix and shift the positions after it. `generate` is the base's own and uses the same hooks. Storage is added by
`softkv.io.soft_model.SoftModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf import call_scope, checkpointing, checks
from softkv.hf.choices import Choices
from softkv.hf.column_losses import has_column_loss, with_next_token_loss
from softkv.hf.context import layers_read
from softkv.hf.frozen import BaseState, FrozenBase, UnsupportedAttention
from softkv.hf.generation.cache_state import CacheState
from softkv.hf.generation.generating import GenerateMixin
from softkv.hf.hooks import DecoderHooks
from softkv.hf.inner import say_prompt_lengths
from softkv.hf.inputs import PACKING, Inputs
from softkv.hf.kept_logits import taken_from
from softkv.hf.learned import ignore_missing_frozen, leave_frozen
from softkv.hf.model_call import ModelCall
from softkv.hf.placement import is_sharded
from softkv.hf.prefixes import SoftRows
from softkv.hf.relative_attention import InScores
from softkv.hf.task_heads import ModuleRedirects
from softkv.hf.task_rows import answers_of
from softkv.hf.unpacked import Unpacked
from softkv.methods.base import Method

FIRST = "default"  # the name of the adapter created by attach


class PromptedModel(GenerateMixin):
    """A frozen model with one or more soft prompts. Other attributes come from the base.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by name; the one of `attach` is "default".
        modules_to_save: other modules trained by adapters (`SavedModules`), by adapter name.
        answers: what the base's logits predict.
    """

    _keys_to_ignore_on_save = None
    _hf_peft_config_loaded = True  # transformers trains quantised models only if they have adapters

    def __init__(
        self,
        model: Any,
        method: Method,
        *,
        tokenizer: Any = None,
        backend: str | None = None,
        head_once: bool = True,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        checks.check_base(model)
        self.base = model
        self.backend = backend
        self.head_once = head_once
        self.adapters = nn.ModuleDict()
        self.modules_to_save = nn.ModuleDict()
        self._default_adapter = FIRST
        self._attached = True
        self._hooks: Any = self._hooks_on(model, backend)
        self._redirects = ModuleRedirects(model, self.modules_to_save, self._hooks)
        try:
            self._frozen = self._reach_attention(tokenizer)
            self.training = model.training
            self.register_state_dict_post_hook(leave_frozen)
            self.register_load_state_dict_post_hook(ignore_missing_frozen)
            self.register_forward_pre_hook(say_prompt_lengths, with_kwargs=True)
            self.answers = answers_of(model)
            self._has_column_loss = has_column_loss(model)
            self.add_adapter(FIRST, method, modules_to_save=modules_to_save)
        except BaseException:
            self.detach()
            raise

    # Overridden for encoder-decoders (`softkv.hf.encoder_decoder`).

    def _hooks_on(self, model: Any, backend: str | None) -> Any:
        return DecoderHooks(model, backend)

    def _reach_attention(self, tokenizer: Any) -> FrozenBase:
        """Switch the base to softkv's attention, unless it keeps its own, and return the base as methods see it.

        Sets whether the base is causal, and whether its windows count columns (`_windowed`).
        """
        try:
            state = BaseState.freeze(self.base, self._hooks)
            self._hooks.register()
            blocks = self._hooks.probe()
        except UnsupportedAttention as reason:
            own = self._hooks.fall_back(reason)
            self.is_causal, self._windowed = own.causal, True
            if isinstance(own.carrier, InScores):
                BaseState.of(self.base).silence_dropout(own.carrier.modules)
            return FrozenBase(self.base, own.widths, tokenizer)
        self._windowed = any(captured.window is not None for captured in blocks)
        self.is_causal = all(captured.causal for captured in blocks)
        state.silence_dropout([captured.block for captured in blocks])
        parallel = self._hooks.parallel
        widths = [each.widths if parallel is None else parallel.whole_widths(each.widths) for each in blocks]
        return FrozenBase(self.base, widths, tokenizer, layers_read(blocks))

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
        """The base's forward with the soft prompt.

        Args:
            input_ids: int64 `[B, T]`; negative ids are a template's soft tokens. Or `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, T]` padding mask (padding on either side), None for no padding or packed rows.
            position_ids: `[B, T]` without the prefix; `[1, N]` restarting ids mark packed rows (or `cu_seq_lens_q`).
            labels: `[B, T]`, -100 where a token is not an answer; a row's prompt ends at its first label.
            prompt_lengths: `[B]`, the number of tokens in each row's prompt, if there are no labels.
            logits_to_keep: as in transformers, in columns of the given batch.
            adapter_names: the adapter of each (packed) row; None in the list means the bare model. By default all rows
                use the active adapter, or the adapters that filled the cache.

        Returns:
            The base's output. Logits are `[B, T, V]`: `logits[:, t]` predicts token t + 1, whatever was inserted.

        Raises:
            ValueError: if adapter_names don't match the rows or the cache; if training needs the ends of prompts and
                neither labels nor prompt_lengths are given; for prompt_lengths that are not `[B]` integers or, on CPU,
                longer than rows; for `output_attentions`; for positions past a learned position table.

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> output = model(torch.tensor([[1, 5, 6, 7]]), labels=torch.tensor([[-100, -100, -100, 7]]))
            >>> output.loss.backward()
            >>> model.soft.k.grad.shape  # [L, 1, G, P, D]
            torch.Size([2, 1, 2, 4, 8])
        """
        module = kwargs.pop(
            "softkv_inner", self.base
        )  # the module to run: the base, or one of its modules (`PromptedSubmodule`)
        if not call_scope.is_enabled(self):
            return self._run_bare(
                adapter_names,
                function=module,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                logits_to_keep=logits_to_keep if isinstance(logits_to_keep, Tensor) or logits_to_keep else None,
                **kwargs,
            )
        if self.answers == "choice" and module is self.base:
            choices = Choices.of(module, input_ids, inputs_embeds)
            batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            batch |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "prompt_lengths": prompt_lengths}
            batch |= {"labels": labels, "adapter_names": adapter_names}
            return self.forward(**choices.flat(batch | kwargs), softkv_inner=choices)
        self._check_options(kwargs)
        inputs = Inputs.read(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, kwargs, self.answers
        )
        next_token = self.answers == "next token"  # otherwise labels are not answers after a prompt
        if self.answers in ("next token", "token"):
            checks.check_labels(labels, inputs.given)
        if inputs.packed is not None and not self._hooks.behaviour.packs:
            batch = {"input_ids": input_ids, "position_ids": position_ids}
            if self._hooks.own is not None and not self._hooks.own.takes_positions:
                del batch["position_ids"]
            batch |= {"inputs_embeds": inputs_embeds, "labels": labels, "prompt_lengths": prompt_lengths}
            batch |= {name: value for name, value in kwargs.items() if name not in (*PACKING, "use_cache")}
            batch["adapter_names"] = adapter_names
            return_dict = batch.pop("return_dict", None)
            output = Unpacked.of(inputs.packed).run(self.forward, batch | {"softkv_inner": module}, logits_to_keep)
            return output.to_tuple() if return_dict is False else output
        if inputs.restarts is not None:
            prompt_lengths = None  # per packed row
            if len(adapter_names or "1") > 1 or self.answers in ("row", "span") or not self._hooks.takes_restarts:
                checks.refuse_restarts()
        if prompt_lengths is not None:
            prompt_lengths = checks.check_prompt_lengths(prompt_lengths, inputs.layout)
        if self.training and past_key_values is None:
            kwargs.setdefault("use_cache", False)  # a cache would only copy every K and V
        keeps_cache = self._keeps_cache(past_key_values, kwargs.get("use_cache"))
        soft = self._soft_rows(adapter_names, inputs.layout.rows, past_key_values)
        heads = not self._carries or (soft.leads and self._head_in_rows(inputs, kwargs))
        tokens = soft.tokens(inputs.layout.rows, heads=heads)

        own = self._hooks.own
        if own is not None and not own.takes_positions and position_ids is not None:
            raise ValueError(f"{type(self.base).__name__} takes no position_ids: leave them out")
        if self.is_causal and self._windowed and (keeps_cache or own is not None) and inputs.is_scattered:
            inputs = inputs.padded_left()
        elif not self.is_causal:
            inputs = self._padded_for_head(inputs)
        if not self._hooks.behaviour.pads and inputs.is_padded_in_front:
            self._hooks.check_pads()
        if soft.reading_prompts and not inputs.past:
            if next_token:
                self._check_prompts_end(soft, labels, prompt_lengths)
            inputs = inputs.with_prompt_ends(labels if next_token else None, prompt_lengths)
        whole = past_key_values is None and kwargs.get("use_cache") is not True
        holds_soft = inputs.ids is not None and checks.check_soft_ids(inputs.ids, soft, inputs.layout, whole=whole)
        inserts = tokens is not None and tokens.longest > 0 and not inputs.past
        if inputs.restarts is not None and (inserts or soft.reading_prompts):
            checks.refuse_restarts()
        if tokens is not None and (holds_soft or inserts):
            inputs = inputs.embedded(tokens, self._hooks.embed)
        if tokens is not None and inserts:
            inputs = inputs.inserted(tokens)
            if not self.is_causal:  # blocks of different lengths leave padding
                inputs = self._padded_for_head(inputs)
        if inputs.past:
            state = CacheState.required(soft, past_key_values)
            inputs = inputs.continuing(state, tokens, windowed=self._windowed)
        else:
            state = CacheState(inputs.given[1], inputs.given[0], soft.names, inputs.mask)

        beside = not heads and not keeps_cache and not inputs.past and self._runs_heads_beside(soft)
        shape = inputs.layout.shape if inputs.packed is None else None
        context = self._context(soft, state, heads=heads, beside=beside, shape=shape)
        if inputs.packed is not None or inputs.restarts is not None:
            context = replace(context, rows=inputs.packed, restarts=inputs.restarts)
        if soft.encodes:
            prompts = None if inputs.prompt_ends is None else inputs.layout.prompts(inputs.prompt_ends)
            context = self._hooks.encoding(context, soft, prompts, state.kv if keeps_cache else None, state.order)
        return_dict = kwargs.pop("return_dict", None)
        own_loss = labels is not None and next_token and module is self.base and self._has_column_loss
        options = kwargs if labels is None or own_loss else kwargs | {"labels": labels}
        embeds = soft_at = None  # not passed to a head that finds the ends of rows by ids
        if self.answers == "row" and self.is_causal and module is self.base:
            embeds = inputs.embeds
            inputs = inputs if embeds is None else inputs.with_row_ids(self.base.config.get_text_config().pad_token_id)
        elif self._hooks.word is not None and inputs.embeds is not None and inputs.tokens is not None:
            embeds = inputs.embeds  # wrappers find images and compute positions by ids
            inputs, soft_at = inputs.with_word_ids(self._hooks.word)
        keywords = inputs.keywords(options, logits_to_keep if module is self.base else None)
        given, kept = position_ids is not None, taken_from(keywords, self.base)
        call = ModelCall(self._hooks, context, soft, positions_given=given, embeds=embeds, soft_at=soft_at, kept=kept)
        output = self._hooks.run(call, module, **keywords, return_dict=True)
        if not inputs.past and output.get("past_key_values") is not None:
            state.store_on(output.past_key_values)
        output = inputs.in_columns_given(output)
        if own_loss:
            output = with_next_token_loss(output, cast(Tensor, labels), kwargs.get("num_items_in_batch"))
        return output.to_tuple() if return_dict is False else output

    def _head_in_rows(self, inputs: Inputs, options: dict[str, Any]) -> bool:
        """Whether soft tokens in front must be part of each row."""
        if inputs.past or options.get("use_cache") is not False:
            return False
        return not self.head_once or (torch.is_grad_enabled() and is_sharded(self.base))

    def _runs_heads_beside(self, soft: SoftRows) -> bool:
        """Whether soft tokens in front may run in the same pass as the rows, without a cache."""
        if not soft.leads or soft.encodes or torch.compiler.is_compiling():
            return False
        return self._hooks.behaviour.packs and (soft.alone is not None or not self.modules_to_save)

    def _check_prompts_end(self, soft: SoftRows, labels: Any, prompt_lengths: Any) -> None:
        if self.training and labels is None and prompt_lengths is None:
            raise ValueError(
                f"{soft.reading_prompts} must know where each row's prompt ends: give labels (-100 on the prompt) "
                "or prompt_lengths"
            )

    def _padded_for_head(self, inputs: Inputs) -> Inputs:
        """Rows of an encoder, padded where its head does not look: heads pool the first column, XLNet's the last."""
        if self.answers == "row" and getattr(self.base.config, "summary_type", None) == "last":
            return inputs.padded_left() if inputs.is_scattered else inputs
        return inputs.padded_right() if inputs.is_padded_in_front else inputs

    def _keeps_cache(self, cache: Any, use_cache: bool | None) -> bool:
        """Whether the base will keep a cache in this forward."""
        if use_cache is False or (self.training and checkpointing.is_on(self.base)):
            return False
        return use_cache or cache is not None or getattr(self.base.config.get_text_config(), "use_cache", False)
