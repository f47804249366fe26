"""The soft prompts of a call: their assignment to rows, and the prefixes of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf import call_scope, checkpointing, checks
from softkv.hf.adapters import AdapterMixin
from softkv.hf.attention import NAME
from softkv.hf.context import SoftContext
from softkv.hf.generation.cache_state import CacheState, past_length
from softkv.hf.placement import check_not_partitioned
from softkv.hf.prefixes import SoftRows
from softkv.methods.base import SoftPrompt
from softkv.prefix import Prefix
from softkv.ranges import named


class PromptMixin(AdapterMixin):
    """Reads adapters for calls."""

    backend: str | None

    def _soft_rows(self, names: Sequence[str | None] | None, rows: int, cache: Any) -> SoftRows:
        """The soft prompts of `rows` rows: those given by name, else those that filled the cache, else the active
        one."""
        state = CacheState.of(cache) if past_length(cache) else None
        filled_with = None
        if state is not None and state.adapters:
            filled_with = SoftRows.of(state.adapters, self.adapters, state.order_of_adapters)
        if names is not None:
            checks.check_names(names, rows)
            read = list(names) if filled_with is None else filled_with.names_of(rows)
            if read != list(names):
                raise ValueError(f"the cache was filled with the adapters {read}, got others: {list(names)}")
        return filled_with or SoftRows.of(names or (self.active_adapter,), self.adapters)

    def _context(self, soft: SoftRows, state: CacheState | None, *, heads: bool, beside: bool = False) -> SoftContext:
        """The prefixes of a forward pass: learned, or the K/V of soft tokens before the input (unless these are part of
        the rows as `heads`).

        Args:
            state: of the cache that is filled or continued. It stores what was computed for its rows, for reuse by
                later calls without gradients.
            beside: whether soft tokens before the input run in the same pass.
        """
        remembered = {} if state is None or torch.is_grad_enabled() else state.prefixes
        prefixes, leading = {}, {}
        with named("prefix"):
            for name, each in soft.softs.items():
                before = each.placement == "before"
                if before and (heads or beside):
                    if beside:
                        leading[name] = cast(Tensor, each.soft_tokens())
                    continue
                prefix = remembered.get(name)
                if prefix is None:
                    prefix = self._head_prefix(each) if before else self._learned_prefix(each)
                    prefix = prefix if prefix is None else prefix.to(dtype=self.base.dtype)
                if prefix is not None:
                    prefixes[name] = prefix
                    if not isinstance(prefix.k, nn.Parameter):  # learned matrices need no recomputation
                        remembered[name] = prefix
            context = soft.context(prefixes, self._hooks.layers, self.device, leading)
        return replace(context, backend=self.backend)

    def _learned_prefix(self, soft: SoftPrompt) -> Prefix | None:
        prefix, parallel = soft.prefix(), self._hooks.parallel
        return prefix if prefix is None or parallel is None else parallel.own(prefix)

    def _head_prefix(self, soft: SoftPrompt) -> Prefix:
        """K/V of the soft tokens before every row, computed once at batch 1; caches are filled after them."""
        soft_tokens = soft.soft_tokens()
        assert soft_tokens is not None
        dtype = self.base.dtype
        with named("head once"):
            # A copy, because some models scale their input in place.
            blocks = self._hooks.capture(inputs_embeds=soft_tokens[None].to(dtype, copy=True))
        like = {"device": soft_tokens.device, "dtype": dtype}
        return Prefix.from_layers(
            [block.key.to(**like) for block in blocks], [block.value.to(**like) for block in blocks]
        )

    def _run_bare(self, adapter_names: Any, *, function: Any, **given: Any) -> Any:
        """Run the base as outside a call."""
        checks.check_bare(given.get("input_ids", given.get("inputs")), adapter_names)
        given = {name: value for name, value in given.items() if value is not None}
        return call_scope.run(None, function, **given)

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        self._check_attached()
        check_not_partitioned(self.soft)
        if self._hooks.own is None:
            checks.check_attention(self._hooks.decoder, NAME)
        if kwargs.get("output_attentions") or getattr(self.base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs attention weights, which softkv never forms: detach the soft prompt or "
                "leave it out"
            )
        if self.training and checkpointing.is_on(self.base):
            if self._hooks.order.repeats:
                raise ValueError(
                    f"{type(self.base).__name__} runs an attention module several times per pass, which a recomputed "
                    "pass can't distinguish: call gradient_checkpointing_disable()"
                )
            for module in self._hooks.decoder.modules():
                checks.check_reentrant(getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}))
