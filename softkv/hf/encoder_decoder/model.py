"""`PromptedEncoderDecoder`: a frozen encoder-decoder with soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from softkv.hf import call_scope, checks
from softkv.hf.encoder_decoder.calls import EncoderDecoderCall, UnchangedPrompts, contexts_of
from softkv.hf.encoder_decoder.frozen import FrozenEncoderDecoder
from softkv.hf.encoder_decoder.hooks import EncoderDecoderHooks
from softkv.hf.encoder_decoder.probe import EncoderDecoderProbe
from softkv.hf.frozen import BaseState, FrozenBase, UnsupportedAttention
from softkv.hf.generation import processors
from softkv.hf.generation.cache_state import CacheState, past_length
from softkv.hf.generation.prompts import mask_of
from softkv.hf.layout import IGNORED, RowLayout, padded_in_front
from softkv.hf.model import PromptedModel
from softkv.hf.own_attention import OwnAttention
from softkv.hf.prefixes import RowTokens, SoftRows
from softkv.methods.base import BaseShape, Method
from softkv.methods.where import Site, where_of
from softkv.prefix import Prefix


class PromptedEncoderDecoder(PromptedModel):
    """A frozen encoder-decoder with one or more soft prompts. Other attributes come from the base.

    Prefixes go to the self-attention of the encoder, the self-attention of the decoder, and cross-attention (`where` of
    a method); soft tokens go to the encoder's rows.
    """

    accepts_loss_kwargs = False  # the base's loss is a mean over one batch and ignores num_items_in_batch
    _hooks: EncoderDecoderHooks
    _frozen: FrozenEncoderDecoder

    def _hooks_on(self, model: Any, backend: str | None) -> Any:
        if not model.can_generate():
            raise ValueError(
                f"softkv.attach expects an encoder-decoder that generates (AutoModelForSeq2SeqLM), got "
                f"{type(model).__name__}"
            )
        return EncoderDecoderHooks(model, backend)

    def _reach_attention(self, tokenizer: Any) -> FrozenBase:
        self.is_causal = False
        hooks = self._hooks
        probe = EncoderDecoderProbe(hooks)
        try:
            state = BaseState.freeze(self.base, hooks)
            hooks.register()
            blocks = probe.reach()
        except UnsupportedAttention as reason:
            BaseState.keep_own_attention(self.base, reason)
            hooks.remove()
            hooks.register()
            hooks.own, blocks = OwnAttention(str(reason), takes_positions=False, causal=False), {}
        else:
            state.silence_dropout([each.block for of_site in blocks.values() for each in of_site])
        probe.probe_inputs()
        if not blocks and not hooks.behaviour.embeds:
            raise UnsupportedAttention(
                f"softkv can neither replace the attention of {type(self.base).__name__} nor insert tokens into its "
                "rows"
            )
        return FrozenEncoderDecoder(hooks, blocks, tokenizer)

    @property
    def base_shape(self) -> BaseShape:
        """The sizes of the base that determine the shapes of learned parameters, for the active adapter's sites."""
        where = where_of(self.method)
        return self._frozen.shape if where is None else self._frozen.at(where).shape

    def counts_positions(self, site: Site) -> bool:
        """Whether attention at a site has relative position biases."""
        return self._hooks.biases.get(site) is not None

    @property
    def embed_scale(self) -> float:
        """The factor that the encoder applies to embeddings of ids, but not to `inputs_embeds`."""
        return self._hooks.embed_scale

    # Adapters ---------------------------------------------------------------------------------------------------------

    def _check_reached(self, adapter: Any) -> None:
        method = getattr(adapter, "method", adapter)
        if getattr(method, "in_rows", False) and not self._hooks.reads_tokens:
            raise ValueError(
                f"the encoder of {type(self.base).__name__} reads no tokens, so soft tokens can't be inserted: "
                f"expected PrefixTuning or PTuningV2, got {type(method).__name__}"
            )
        super()._check_reached(adapter)

    def _placed(self, adapter: Any, frozen: FrozenBase) -> tuple[Any, FrozenBase]:
        method, name = getattr(adapter, "method", adapter), type(self.base).__name__
        if isinstance(adapter, Prefix):
            raise ValueError(f"{name} is an encoder-decoder: expected a method or a folder, got a Prefix")
        if not isinstance(method, Method):
            return adapter, frozen
        if method.in_rows:
            return adapter, frozen
        if getattr(method, "encoder", None) is not None:
            raise ValueError(f"prompt encoders don't support encoder-decoders such as {name}: leave the encoder out")
        assert isinstance(frozen, FrozenEncoderDecoder)
        where = where_of(adapter)
        if where is None and adapter is method:
            where = frozen.where
            adapter = replace(cast(Any, method), where=where)
        if not where:
            raise ValueError(
                f"this adapter has no attention sites (where) for the encoder-decoder {name}: it was trained on a "
                "model with one stack"
            )
        return adapter, frozen.at(where)

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward with the soft prompt.

        Args:
            input_ids: int64 `[B, S]`, of the encoder; negative ids are a template's soft tokens. Or `inputs_embeds`
                `[B, S, C]`, `input_features` (Whisper), or `encoder_outputs`.
            attention_mask: `[B, S]` padding mask (padding on either side), or None.
            decoder_input_ids: int64 `[B, T]`; None: the base shifts the labels.
            decoder_attention_mask: `[B, T]`, padding on the right.
            labels: `[B, T]`, -100 after the end of a row.
            adapter_names: the adapter of each row; None in the list means the bare model. By default all rows use the
                active adapter, or the adapters that filled the cache.
            **kwargs: other arguments of the base's forward.

        Returns:
            The base's output: `logits[:, t]` of `[B, T, V]` predicts label t. `encoder_last_hidden_state` contains the
            soft tokens in the encoder's rows, with padding on the right.

        Raises:
            ValueError: if shapes don't match; for left-padded decoder rows; for `encoder_outputs` computed without the
                encoder's soft prompt; for `output_attentions`.

        Example:
            >>> sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
            >>> config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
            >>> t5 = transformers.T5ForConditionalGeneration(config)
            >>> model = softkv.attach(t5, softkv.PTuningV2(length=4, where=("decoder", "cross")))
            >>> output = model(torch.tensor([[5, 6, 1]]), labels=torch.tensor([[7, 1]]))
            >>> output.loss.backward()
            >>> model.soft.k.grad.shape  # [L, 1, G, P, D]: two blocks at either site
            torch.Size([4, 1, 4, 4, 8])
        """
        module = kwargs.pop("softkv_inner", self.base)
        given = kwargs | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "inputs_embeds": inputs_embeds,
            "input_features": input_features,
            "labels": labels,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not call_scope.is_enabled(self):
            return self._run_bare(adapter_names, function=module, **given)
        self._check_options(kwargs)
        if module is not self.base and module is not self.base.base_model:
            raise ValueError(
                f"{type(module).__name__} can't run alone, because {type(self.base).__name__} has soft prompts in both "
                "stacks: call the model, or use disabled() for the bare one"
            )
        cache = given.get("past_key_values")
        checks.check_cache(cache)
        rows = self._check_inputs(given, past_length(cache))
        soft = self._soft_rows(adapter_names, rows, cache)
        tokens = self._tokens(soft, rows, given, past_length(cache))
        if self.training:
            given.setdefault("use_cache", False)  # a cache would only copy every K and V
        call = EncoderDecoderCall(self._hooks, soft, self._contexts(soft), tokens)
        return_dict = given.pop("return_dict", None)
        output = self._hooks.run(call, module, **given, return_dict=True)
        filled = output.get("past_key_values")
        if filled is not None and CacheState.of(filled) is None:
            names = soft.names if len(soft.names) == 1 else tuple(soft.names_of(rows))
            CacheState(0, rows, names).store_on(filled)
        return output.to_tuple() if return_dict is False else output

    def _check_inputs(self, given: dict[str, Any], past: int) -> int:
        """Check that the inputs of `forward` match each other, and return the number of rows."""
        ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        encoded = given.get("encoder_outputs")
        if self._hooks.reads_tokens and encoded is None:
            tokens = checks.check_tokens(ids, embeds)
            checks.check_mask(mask, len(tokens), (tokens.shape[1],))
            rows = len(tokens)
        else:
            first = encoded[0] if encoded is not None else given.get(self.base.main_input_name)
            if not isinstance(first, Tensor):
                raise ValueError(f"SoftModel expects {self.base.main_input_name} or encoder_outputs, got neither")
            rows = len(first)
        targets = [name for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds") if name in given]
        if not targets:
            raise ValueError("SoftModel of an encoder-decoder expects labels or decoder_input_ids, got neither")
        width = given[targets[-1]].shape[1]
        for name in targets:
            if given[name].shape[:2] != (rows, width):
                raise ValueError(f"{name} expects [{rows}, {width}], got {checks.described(given[name])}")
        labels = given["labels"] if targets == ["labels"] else None
        if labels is not None and checks.is_readable(labels):
            ignored = labels == IGNORED
            if bool((ignored[:, 0] & ~ignored.all(1)).any()):
                raise ValueError(
                    "labels expect -100 only after the end of a row, got some in front: the decoder reads the labels"
                )
        self._check_decoder_mask(given.get("decoder_attention_mask"), rows, (width, past + width))
        return rows

    def _check_decoder_mask(self, mask: Any, rows: int, widths: Sequence[int]) -> None:
        """Refuse left-padded decoder rows."""
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in widths:
            columns = " or ".join(map(str, dict.fromkeys(widths)))
            raise ValueError(f"decoder_attention_mask expects [{rows}, {columns}], got {checks.described(mask)}")
        if padded_in_front(mask):
            raise ValueError(
                "decoder_attention_mask expects padding on the right, got some on the left: the decoder's positions "
                "are its columns"
            )

    def _tokens(self, soft: SoftRows, rows: int, given: dict[str, Any], past: int) -> RowTokens | None:
        """The soft tokens in the encoder's rows, after checking that the inputs leave room for them."""
        ids, mask, tokens = given.get("input_ids"), given.get("attention_mask"), soft.tokens(rows, heads=True)
        if given.get("encoder_outputs") is not None:
            if not past and (
                tokens is not None or any("encoder" in (where_of(s.config) or ()) for s in soft.softs.values())
            ):
                raise ValueError(
                    "encoder_outputs were computed without the soft prompt of the encoder: give input_ids instead"
                )
            if not past and isinstance(mask, Tensor) and mask.dim() == 2 and padded_in_front(mask):
                raise ValueError(
                    "encoder_outputs expect padding on the right, got an attention_mask with some on the left"
                )
        elif isinstance(ids, Tensor) and self._hooks.reads_tokens:
            layout = RowLayout.of((rows, ids.shape[1]), mask, None, ids.device)
            checks.check_soft_ids(ids, soft, layout, whole=not past)
        return tokens

    def _contexts(self, soft: SoftRows) -> Any:
        return contexts_of(soft, self._hooks.counts, torch.empty(0, device=self.device, dtype=self.base.dtype))

    # Generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's `generate` with the soft prompt.

        Args:
            inputs / input_ids: int64 `[B, S]`, of the encoder; negative ids are a template's soft tokens. Or
                `inputs_embeds`, `input_features`, `encoder_outputs`.
            generation_config: transformers' `GenerationConfig`; the base's own by default.
            attention_mask: `[B, S]`, padding on either side.
            adapter_names: the adapter of each row, as in `forward`.
            **kwargs: other arguments of the base's `generate`.

        Returns:
            The base's output.

        Raises:
            ValueError: if shapes don't match, or an option would ignore the soft prompt.

        Example:
            >>> sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
            >>> config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)
            >>> t5 = transformers.T5ForConditionalGeneration(config)
            >>> model = softkv.attach(t5, softkv.PTuningV2(length=4))
            >>> model.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=3).shape
            torch.Size([1, 4])
        """
        main = self.base.main_input_name
        ids = inputs if input_ids is None else input_ids
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        given = {name: kwargs.pop(name) for name in ("inputs_embeds", "encoder_outputs", main) if name in kwargs}
        given |= {main: ids} if ids is not None else {}
        given |= {} if attention_mask is None else {"attention_mask": attention_mask}
        if not call_scope.is_enabled(self):
            return self._run_bare(adapter_names, function=self.base.generate, **given, **kwargs)
        self._check_options(kwargs)
        cache = kwargs.get("past_key_values")
        checks.check_cache(cache)
        config = generation_config or self.base.generation_config
        rows = self._check_generate_inputs(given, kwargs)
        soft = self._soft_rows(adapter_names, rows, cache)
        tokens = self._tokens(soft, rows, given, past_length(cache))
        read = given.get("input_ids") if self._hooks.reads_tokens else None
        if read is not None:
            given.setdefault("attention_mask", mask_of(read, kwargs, config))
            if bool((read < 0).any()):
                if kwargs.get("encoder_no_repeat_ngram_size", getattr(config, "encoder_no_repeat_ngram_size", None)):
                    raise ValueError(
                        "encoder_no_repeat_ngram_size compares input ids, which soft tokens don't have: expected "
                        "encoder_no_repeat_ngram_size=0 with PTuning"
                    )
                # For logits processors, soft tokens are replaced by a token that the row already contains.
                given["input_ids"] = torch.where(read < 0, read.amax(1, keepdim=True).clamp(min=0), read)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = processors.Streamer(kwargs["streamer"], None)
        call = EncoderDecoderCall(
            self._hooks, soft, self._contexts(soft), tokens, ids=read, prompts=UnchangedPrompts(), model=self
        )
        processors.install(self.base)
        return self._hooks.run(call, self.base.generate, **given, **kwargs)

    def _check_generate_inputs(self, given: dict[str, Any], options: dict[str, Any]) -> int:
        """Check the inputs and options of `generate`, and return the number of rows."""
        config = options.get("generation_config") or self.base.generation_config
        checks.check_ways(
            {name: options.get(name, getattr(config, name)) for name in ("cache_implementation", "token_healing")}
        )
        encoded = given.get("encoder_outputs")
        if encoded is not None:
            rows = len(encoded[0])
        elif self._hooks.reads_tokens:
            tokens = checks.check_tokens(given.get("input_ids"), given.get("inputs_embeds"))
            checks.check_mask(given.get("attention_mask"), len(tokens), (tokens.shape[1],))
            rows = len(tokens)
        elif isinstance(given.get(self.base.main_input_name), Tensor):
            rows = len(given[self.base.main_input_name])
        else:
            raise ValueError(f"SoftModel.generate expects {self.base.main_input_name} or encoder_outputs, got neither")
        mask = options.get("decoder_attention_mask")
        if isinstance(mask, Tensor):
            self._check_decoder_mask(mask, rows, (mask.shape[-1],))
        return rows
