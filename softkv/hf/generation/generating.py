"""`generate`: the base's own, with soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softkv.hf import call_scope, checks
from softkv.hf.generation import processors
from softkv.hf.generation.cache_state import CacheState, check_contiguous, past_length
from softkv.hf.generation.prompts import Prompts, lengthened, mask_of, pad_id
from softkv.hf.layout import RowLayout, padded_in_front
from softkv.hf.model_call import ModelCall
from softkv.hf.prompting import PromptMixin
from softkv.hf.vocabulary import named_ids


class GenerateMixin(PromptMixin):
    """Adds `generate`."""

    _windowed: bool

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
        """The base's `generate` with the soft prompt; every row is a complete prompt.

        Args:
            inputs / input_ids: int64 `[B, T]`; negative ids are a template's soft tokens. Or `inputs_embeds`.
            generation_config: transformers' `GenerationConfig`; the base's own by default.
            attention_mask: `[B, T]`, padding on either side.
            adapter_names: the adapter of each row, as in `forward`.
            **kwargs: other arguments of the base's `generate`.

        Returns:
            The base's output. Sequences start with the given ids, with padding in place of soft tokens.

        Example:
            >>> model = softkv.attach(base, softkv.PromptTuning(length=2))
            >>> model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False).shape
            torch.Size([1, 6])
        """
        ids = inputs if input_ids is None else input_ids
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if not call_scope.is_enabled(self):
            bare = {"inputs": ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
            return self._run_bare(adapter_names, function=self.base.generate, **bare, **kwargs)
        self._check_options(kwargs)
        tokens = self._check_prompts(ids, inputs_embeds, attention_mask)
        config = generation_config or self.base.generation_config
        checks.check_ways(
            {name: kwargs.get(name, getattr(config, name)) for name in ("cache_implementation", "token_healing")}
        )
        cache = kwargs.get("past_key_values")
        checks.check_cache(cache)
        past = past_length(cache)
        soft = self._soft_rows(adapter_names, len(tokens), cache)
        heads = not self._carries
        soft_tokens = soft.tokens(len(tokens), heads=heads)
        k = soft_tokens.longest if soft_tokens is not None else 0
        if k and past:
            raise ValueError(
                "PromptTuning inserts its block into every prompt: generate expects an empty cache, got a filled one"
            )
        if ids is not None:
            layout = RowLayout.of((len(ids), ids.shape[1]), None, None, ids.device)
            checks.check_soft_ids(ids, soft, layout, whole=not past)
            if attention_mask is None:
                attention_mask = mask_of(ids, kwargs, config)
        prompts = Prompts.prepare(
            ids,
            inputs_embeds,
            attention_mask,
            soft=soft_tokens,
            pad=pad_id(kwargs, config),
            past=past,
            placeholders=named_ids(self.base.config),
            options=kwargs,
        )
        if not self._hooks.behaviour.pads and prompts.mask is not None and padded_in_front(prompts.mask):
            self._hooks.check_pads()
        state = None
        if past:
            state = CacheState.required(soft, cache)
            self._continue_from(state, prompts, past)
            state.store_on(cache)
        elif cache is not None:
            CacheState.clear(cache)
        options = lengthened(kwargs, config, prompts.inserted) | prompts.types
        if options.get("streamer") is not None:
            options["streamer"] = prompts.streamer(options["streamer"])
        table = None if prompts.soft_at is None or soft_tokens is None else soft_tokens.table
        call = ModelCall(self._hooks, self._context(soft, state, heads=heads), soft, prompts, table, model=self)
        processors.install(self.base)
        given = {"inputs": prompts.ids, "attention_mask": prompts.mask, "inputs_embeds": prompts.embeds}
        given = {name: value for name, value in given.items() if value is not None}
        return prompts.with_given(self._hooks.run(call, self.base.generate, **given, **options))

    def _check_prompts(self, ids: Any, embeds: Any, mask: Any) -> Tensor:
        """The prompts given to `generate`, `[B, T]` or `[B, T, C]`."""
        if ids is None and embeds is None:
            raise ValueError("SoftModel.generate expects input_ids or inputs_embeds")
        if ids is not None:
            checks.check_ids(ids)
        tokens = ids if ids is not None else checks.check_tokens(None, embeds)
        checks.check_mask(mask, len(tokens), (tokens.shape[1],))
        return tokens

    def _continue_from(self, state: CacheState, prompts: Prompts, past: int) -> None:
        """Check that prompts continue the rows of a cache."""
        mask = prompts.mask
        tokens = prompts.ids if prompts.ids is not None else prompts.embeds
        assert tokens is not None
        state.unread = (tokens if mask is None else mask).shape[1] - past
        if mask is not None:
            state.check_same_rows(mask)
            if self._windowed:
                check_contiguous(mask, mask.shape[1] - past)
