"""The soft prompts of a call: their assignment to rows, and the prefixes of a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf import call_scope, checkpointing, checks
from softkv.hf.adapters import AdapterMixin
from softkv.hf.attention import NAME
from softkv.hf.context import SoftContext
from softkv.hf.generation.cache_state import CacheState, ReadContext, Source, past_length
from softkv.hf.placement import check_not_partitioned
from softkv.hf.prefixes import SoftRows
from softkv.methods.base import SoftPrompt
from softkv.ops.torch.small import copies_prefixes
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

    def _context(
        self,
        soft: SoftRows,
        state: CacheState | None,
        *,
        heads: bool,
        beside: bool = False,
        shape: tuple[int, int] | None = None,
    ) -> SoftContext:
        """The prefixes of a forward pass: learned, or the K/V of soft tokens that stand before the input (unless these
        are put into the rows as `heads`).

        Args:
            state: of the cache that is filled or continued. Results computed for its rows are stored there and reused
                by calls without gradients.
            beside: whether soft tokens before the input run in one pass with it.
            shape: (B, T) of rows that are not packed.
        """
        kept = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else state
        remembered = {} if kept is None else kept.prefixes
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
                if prefix is not None:
                    prefixes[name] = prefix
            if kept is not None and kept.context is not None and kept.context.made_of(soft, prefixes, self.backend):
                return kept.context.context
            read = dict(prefixes)
            for name, prefix in read.items():
                prefixes[name] = prefix.to(dtype=self.base.dtype)
                if torch.is_grad_enabled() and shape is not None and not torch.compiler.is_compiling():
                    prefixes[name] = self._of_each_row(soft, prefixes[name], shape)
                if not isinstance(prefixes[name].k, nn.Parameter):  # reading learned matrices again is free
                    remembered[name] = prefixes[name]
            context = soft.context(prefixes, self._hooks.layers, self.device, leading)
        context = replace(context, backend=self.backend)
        alike = all(isinstance(prefix.k, Tensor) for prefix in read.values())  # one tensor for all layers
        if kept is not None and alike and not leading and not soft.encodes:
            kept.context = ReadContext(context, soft, {name: Source.of(prefix) for name, prefix in read.items()})
        return context

    def _of_each_row(self, soft: SoftRows, prefix: Prefix, shape: tuple[int, int]) -> Prefix:
        """A copy of the prefix per row if the op would copy it anyway, in small passes with gradients: the gradients
        are then summed over rows once for all layers."""
        k, v = prefix.k, prefix.v
        if soft.alone is None or self._hooks.own is not None or self.backend not in (None, "torch"):
            return prefix
        if not isinstance(k, Tensor) or not isinstance(v, Tensor) or prefix.lengths is not None:
            return prefix
        (B, T), (_, A, *one) = shape, k.shape
        learns = k.is_cpu and k.requires_grad and A == 1 < B and k.shape == v.shape
        return prefix.of_each(B) if learns and copies_prefixes(B, T, *one) else prefix

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
        if "deepspeed" in sys.modules:
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
