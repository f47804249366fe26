"""`PromptedModel`: a frozen transformers model with soft prompts.

`forward` puts soft tokens into the rows (`softkv.hf.inputs`); pre-hooks inside the decoder (`softkv.hf.hooks`) add the
prefix and move the positions behind it. `generate` is the base's own, entered through the same hooks. Storage is not
its business: `softkv.io.model.SoftModel` adds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from softkv.hf import calls, checkpointing, checks
from softkv.hf.attention import NAME
from softkv.hf.choices import Choices
from softkv.hf.context import SoftContext
from softkv.hf.frozen import BaseState, FrozenBase, OutOfReach
from softkv.hf.generation import processors
from softkv.hf.generation.cache_state import CacheState, check_contiguous, past_length
from softkv.hf.generation.prompts import Prompts, lengthened, mask_of, pad_id
from softkv.hf.hooks import DecoderHooks, ModelCall
from softkv.hf.inner import say_prompt_lengths
from softkv.hf.inputs import PACKING, Inputs
from softkv.hf.kept_logits import taken_from
from softkv.hf.layout import RowLayout, padded_in_front
from softkv.hf.learned import leave_frozen, miss_nothing_frozen
from softkv.hf.placement import check_not_partitioned, device_of, is_sharded
from softkv.hf.prefixes import SoftRows, check_known
from softkv.hf.surface import Surface
from softkv.hf.task_heads import Redirects, SavedModules, paths_of
from softkv.hf.task_rows import answers_of
from softkv.hf.unpacked import Unpacked
from softkv.hf.vocabulary import named_ids
from softkv.methods.base import BaseShape, Method, SoftPrompt
from softkv.methods.p_tuning_v2 import matrices_of
from softkv.methods.where import where_of
from softkv.prefix import Prefix
from softkv.ranges import named

FIRST = "default"  # the name of the adapter that a model is attached with
_LONGEST_NAME = 255  # bytes: checkpoints keep each adapter in a folder of its name


class PromptedModel(Surface):
    """A frozen model with one or more soft prompts. Other attributes come from the base.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by its name; that of `attach` is "default".
        modules_to_save: what adapters learn beside (`SavedModules`), by the name of each that does.
        answers: what the base's logits answer.
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
        self._redirects = Redirects(model, self.modules_to_save, self._hooks)
        try:
            self._frozen = self._reach_attention(tokenizer)
            self.training = model.training
            self.register_state_dict_post_hook(leave_frozen)
            self.register_load_state_dict_post_hook(miss_nothing_frozen)
            self.register_forward_pre_hook(say_prompt_lengths, with_kwargs=True)
            self.answers = answers_of(model)
            self.add_adapter(FIRST, method, modules_to_save=modules_to_save)
        except BaseException:
            self.detach()
            raise

    # What an encoder-decoder does in its own way (`softkv.hf.encoder_decoder`).

    def _hooks_on(self, model: Any, backend: str | None) -> Any:
        return DecoderHooks(model, backend)

    def _placed(self, adapter: Any, frozen: FrozenBase) -> tuple[Any, FrozenBase]:
        """An adapter that says where it stands, and the base as it sees it."""
        if where_of(adapter) is not None:
            raise ValueError(
                f"where={where_of(adapter)} is of encoder-decoders, {type(self.base).__name__} has one stack: leave it "
                "out"
            )
        return adapter, frozen

    def _reach_attention(self, tokenizer: Any) -> FrozenBase:
        """Puts softkv's attention into the base, unless the base keeps its own; the base as methods see it then.

        Attributes are set: whether the base is causal, and whether columns count in it (`_windowed`).
        """
        try:
            state = BaseState.freeze(self.base, self._hooks)
            self._hooks.register()
            blocks = self._hooks.probe()
        except OutOfReach as reason:
            self._hooks.remove()
            BaseState.keep_own_attention(self.base, reason)
            self.is_causal, self._windowed = self._hooks.keep_own_attention(reason).causal, True
            self._hooks.register()
            return FrozenBase(self.base, [], tokenizer)
        self._windowed = any(captured.window is not None for captured in blocks)
        self.is_causal = all(captured.causal for captured in blocks)
        state.silence_dropout([captured.block for captured in blocks])
        parallel = self._hooks.parallel
        widths = [each.widths if parallel is None else parallel.whole_widths(each.widths) for each in blocks]
        return FrozenBase(self.base, widths, tokenizer)

    # Adapters --------------------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str:
        """The adapter of calls without `adapter_names`: that of the innermost `using` of this context, else that of
        `set_adapter`."""
        return calls.adapter_in_scope(self) or self._default_adapter

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
        self,
        name: str,
        adapter: Method | Prefix,
        *,
        tokenizer: Any = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Adds a soft prompt. The active adapter stays active.

        Args:
            name: a new name, of letters, digits, spaces, "_" and "-", at most 255 bytes long.
            adapter: a method, which is built; or a prefix of one row (A = 1), which is trained further as `PTuningV2`.
            tokenizer: of the base, for an init from a text; None takes that of `attach`.
            modules_to_save: modules of the base that it learns copies of, by name; None: the head of a task's class.

        Raises:
            ValueError: when the name is taken or none, or the adapter does not fit the base. Nothing is added then.
            TypeError: when the adapter is none of these.
        """
        self._check_attached()
        checks.check_in_one_piece(self.base)
        self._check_new_name(name)
        self._check_reached(adapter)
        frozen = self._frozen if tokenizer is None else self._frozen.with_tokenizer(tokenizer)
        adapter, frozen = self._placed(adapter, frozen)
        if isinstance(adapter, Prefix):
            soft: SoftPrompt = matrices_of(adapter, frozen.shape)
        elif isinstance(adapter, Method):
            parallel = self._hooks.parallel
            with nullcontext() if parallel is None else parallel.drawing_alike():
                soft = adapter.build(frozen)
        else:
            raise TypeError(
                f"an adapter expects a method such as PTuningV2(length=16), a prefix or a folder, got {adapter!r}"
            )
        if not self.is_causal and soft.encodes_rows:
            raise ValueError(
                f"{type(self.base).__name__} is bidirectional, its rows have no prompt that comes before an answer: "
                "leave the encoder out"
            )
        if self.is_causal and soft.placement == "after" and self.answers in ("token", "span"):
            raise ValueError(
                f"{type(self.base).__name__} answers for each token, and no token sees soft tokens after its row: "
                'expected PromptTuning(position="before"), got "after"'
            )
        saved = self._modules_of(adapter, modules_to_save)
        if soft.placement is not None and not self._hooks.behaviour.embeds:
            raise ValueError(
                f"{type(self.base).__name__} reads the ids of tokens beside their embeddings (per-layer embeddings), "
                f"which soft tokens do not have: expected PrefixTuning or PTuningV2, got {type(soft.config).__name__}"
            )
        if soft.encodes_rows:
            self._hooks.hook_blocks()
        device = device_of(self.base)
        # A base without values yet leaves what is learned where it was made.
        soft = soft if device.type == "meta" else soft.to(device)
        if self._hooks.parallel is not None:
            self._hooks.parallel.share(soft)
        self.adapters[name] = soft.train(self.training)
        if saved.paths:
            self.modules_to_save[name] = (saved if device.type == "meta" else saved.to(device)).train(self.training)
            self._redirects.add(saved.paths)

    def _check_reached(self, adapter: Any) -> None:
        """Refuses what needs softkv's attention where the base keeps its own."""
        own, method = self._hooks.own, getattr(adapter, "method", adapter)  # of a saved adapter
        if own is not None and isinstance(method, Method | Prefix) and not getattr(method, "in_rows", False):
            raise ValueError(
                f"{type(self.base).__name__} keeps its own attention, which only soft tokens inside rows can steer: "
                f"expected PromptTuning or PTuning, got {type(method).__name__} ({own.reason})"
            )

    def _modules_of(self, adapter: Any, names: Sequence[str] | None) -> SavedModules:
        tensors = getattr(adapter, "modules", None)  # of a saved adapter
        if tensors is None:
            return SavedModules(self.base, paths_of(self.base, names, self._hooks.order.modules))
        if names is not None:
            raise ValueError("a saved adapter brings its own modules_to_save: leave them out")
        return SavedModules(self.base, adapter.modules_to_save, tensors)

    @property
    def _carries(self) -> bool:
        """Whether a prefix can replace soft tokens in front: their K/V have one shape and carry all their state."""
        return self._hooks.behaviour.carries and self.base_shape.kv_heads > 0

    def _check_new_name(self, name: Any) -> None:
        if name in self.adapters:
            raise ValueError(f"this model already has an adapter {name!r}: delete it first, or choose another name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w -]*", name) or hasattr(self.adapters, name):
            raise ValueError(
                'the name of an adapter expects letters, digits, spaces, "_" and "-", and must be no attribute of '
                f"nn.ModuleDict, got {name!r:.300}"
            )
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"the name of an adapter expects at most {_LONGEST_NAME} bytes, got {len(name.encode())}")

    def set_adapter(self, name: str) -> None:
        """Sets the adapter of calls without `adapter_names`, in every thread."""
        check_known(name, self.adapters)
        self._default_adapter = name

    @contextmanager
    def using(self, name: str) -> Iterator[Self]:
        """Activates an adapter within this context. Other threads and tasks keep theirs.

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> model.add_adapter("terse", softkv.PromptTuning(length=2))
            >>> with model.using("terse"):
            ...     print(model.active_adapter)
            terse
            >>> model.active_adapter
            'default'
        """
        check_known(name, self.adapters)
        with calls.scope(calls.Scope(self, adapter=name)):
            yield self

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            ValueError: when it is the active one, or there is none of that name.
        """
        check_known(name, self.adapters)
        if name in (self.active_adapter, self._default_adapter):
            raise ValueError(f"adapter {name!r} is the active one: set_adapter(...) another before it is deleted")
        del self.adapters[name]
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    # On and off ------------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Disables soft prompts within this context. Other threads and tasks are unaffected.

        Example:
            >>> ids = torch.tensor([[1, 5, 6]])
            >>> expected = base(ids).logits
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> with model.disabled():
            ...     torch.allclose(model(ids).logits, expected, atol=1e-5)
            True
        """
        with calls.scope(calls.Scope(self, disabled=True)):
            yield self

    def detach(self) -> Any:
        """Detaches the soft prompt and returns the base. Detaching the last one restores the base exactly:
        requires_grad, attention implementation, dropout, training mode of every module."""
        try:
            self._take_off()
        except BaseException:  # an interrupt leaves nothing half done
            self._take_off()
            raise
        return self.base

    def _take_off(self) -> None:
        if self._attached:
            self._hooks.remove()
            self._redirects.remove()
            BaseState.release(self.base, self._hooks)
            self._attached = False

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
            labels: `[B, T]`, -100 where a token is not an answer; a row's prompt ends at its first label.
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

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> output = model(torch.tensor([[1, 5, 6, 7]]), labels=torch.tensor([[-100, -100, -100, 7]]))
            >>> output.loss.backward()
            >>> model.soft.k.grad.shape  # [L, 1, G, P, D]
            torch.Size([2, 1, 2, 4, 8])
        """
        module = kwargs.pop("softkv_inner", self.base)  # what is run: the base, or that of its modules (`Inner`)
        if not calls.is_enabled(self):
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
        next_token = self.answers == "next token"  # else labels are no answers behind a prompt
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
        elif not self.is_causal and inputs.is_padded_in_front:
            inputs = inputs.padded_right()
        if not self._hooks.behaviour.pads and inputs.is_padded_in_front:
            self._hooks.check_pads()
        if soft.reading_prompts and not inputs.past:
            if next_token:
                self._check_prompts_end(soft, labels, prompt_lengths)
            inputs = inputs.with_prompt_ends(labels if next_token else None, prompt_lengths)
        learns = self.training and torch.is_grad_enabled()
        holds_soft = inputs.ids is not None and checks.check_soft_ids(inputs.ids, soft, inputs.layout, learns=learns)
        inserts = tokens is not None and tokens.longest > 0 and not inputs.past
        if tokens is not None and (holds_soft or inserts):
            inputs = inputs.embedded(tokens, self._hooks.embed)
        if tokens is not None and inserts:
            inputs = inputs.inserted(tokens)
            if not self.is_causal and inputs.is_padded_in_front:  # by blocks of different lengths
                inputs = inputs.padded_right()
        if inputs.past:
            state = CacheState.required(soft, past_key_values)
            inputs = inputs.continuing(state, tokens, windowed=self._windowed)
        else:
            state = CacheState(inputs.given[1], inputs.given[0], soft.names, inputs.mask)

        beside = not heads and not keeps_cache and not inputs.past and self._runs_heads_beside(soft)
        context = replace(self._context(soft, state, heads=heads, beside=beside), rows=inputs.packed)
        if soft.encodes:
            prompts = None if inputs.prompt_ends is None else inputs.layout.prompts(inputs.prompt_ends)
            context = self._hooks.encoding(context, soft, prompts, state.kv if keeps_cache else None, state.order)
        return_dict = kwargs.pop("return_dict", None)
        options = kwargs if labels is None else kwargs | {"labels": labels}
        embeds = None  # what is not shown to a head, which finds the ends of rows by ids
        if self.answers == "row" and self.is_causal and module is self.base:
            embeds = inputs.embeds
            inputs = inputs if embeds is None else inputs.with_row_ids(self.base.config.get_text_config().pad_token_id)
        keywords = inputs.keywords(options, logits_to_keep if module is self.base else None)
        given, kept = position_ids is not None, taken_from(keywords, self.base)
        call = ModelCall(self._hooks, context, soft, positions_given=given, embeds=embeds, kept=kept)
        output = self._hooks.run(call, module, **keywords, return_dict=True)
        if not inputs.past and output.get("past_key_values") is not None:
            state.store_on(output.past_key_values)
        output = inputs.in_columns_given(output)
        return output.to_tuple() if return_dict is False else output

    def _head_in_rows(self, inputs: Inputs, options: dict[str, Any]) -> bool:
        """Whether soft tokens in front run in each row all the same."""
        if inputs.past or options.get("use_cache") is not False:
            return False
        return not self.head_once or (torch.is_grad_enabled() and is_sharded(self.base))

    def _runs_heads_beside(self, soft: SoftRows) -> bool:
        """Whether soft tokens in front may run in one pass with the rows, where no cache is kept."""
        if not soft.leads or soft.encodes or torch.compiler.is_compiling():
            return False
        return self._hooks.behaviour.packs and (soft.alone is not None or not self.modules_to_save)

    def _check_prompts_end(self, soft: SoftRows, labels: Any, prompt_lengths: Any) -> None:
        if self.training and labels is None and prompt_lengths is None:
            raise ValueError(
                f"{soft.reading_prompts} must know where each row's prompt ends: give labels (-100 on the prompt) "
                "or prompt_lengths"
            )

    def _run_bare(self, adapter_names: Any, *, function: Any, **given: Any) -> Any:
        """The base as outside of any call."""
        checks.check_bare(given.get("input_ids", given.get("inputs")), adapter_names)
        given = {name: value for name, value in given.items() if value is not None}
        return calls.run(None, function, **given)

    def _keeps_cache(self, cache: Any, use_cache: bool | None) -> bool:
        """Whether the base will keep a cache in this forward."""
        if use_cache is False or (self.training and checkpointing.is_on(self.base)):
            return False
        return use_cache or cache is not None or getattr(self.base.config.get_text_config(), "use_cache", False)

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

        Example:
            >>> model = softkv.attach(base, softkv.PromptTuning(length=2))
            >>> model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False).shape
            torch.Size([1, 6])
        """
        ids = inputs if input_ids is None else input_ids
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if not calls.is_enabled(self):
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
                "PromptTuning puts its block into every prompt: generate expects an empty cache, got a filled one"
            )
        if ids is not None:
            checks.check_soft_ids(ids, soft, RowLayout.of((len(ids), ids.shape[1]), None, None, ids.device))
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
        """Checks that prompts continue the rows of a cache."""
        mask = prompts.mask
        tokens = prompts.ids if prompts.ids is not None else prompts.embeds
        assert tokens is not None
        state.unread = (tokens if mask is None else mask).shape[1] - past
        if mask is not None:
            state.check_same_rows(mask)
            if self._windowed:
                check_contiguous(mask, mask.shape[1] - past)

    # What the soft prompts give ---------------------------------------------------------------------------------------

    def _soft_rows(self, names: Sequence[str | None] | None, rows: int, cache: Any) -> SoftRows:
        """The soft prompts of `rows` rows: those named, else those that the cache continued from was filled with, else
        the active one."""
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
        """The prefixes of a forward pass: learned, or the K/V of soft tokens that stand before the input (unless these
        are put into the rows as `heads`).

        Args:
            state: of the cache that is filled or continued. It keeps what was computed for its rows, which calls that
                continue them without gradients use again.
            beside: whether soft tokens before the input run in one pass with it.
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
                    if not isinstance(prefix.k, nn.Parameter):  # learned matrices cost nothing to read again
                        remembered[name] = prefix
            context = soft.context(prefixes, len(self._hooks.order), self.device, leading)
        return replace(context, backend=self.backend)

    def _learned_prefix(self, soft: SoftPrompt) -> Prefix | None:
        prefix, parallel = soft.prefix(), self._hooks.parallel
        return prefix if prefix is None or parallel is None else parallel.own(prefix)

    def _head_prefix(self, soft: SoftPrompt) -> Prefix:
        """K/V of the soft tokens that stand before every row, run once, at batch 1: caches are filled behind them."""
        soft_tokens = soft.soft_tokens()
        assert soft_tokens is not None
        dtype = self.base.dtype
        with named("head once"):
            # A copy: some models scale what they are given in place.
            blocks = self._hooks.capture(inputs_embeds=soft_tokens[None].to(dtype, copy=True))
        like = {"device": soft_tokens.device, "dtype": dtype}
        return Prefix.from_layers(
            [block.key.to(**like) for block in blocks], [block.value.to(**like) for block in blocks]
        )

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this soft prompt was detached from its model: attach it again")

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        self._check_attached()
        check_not_partitioned(self.soft)
        if self._hooks.own is None:
            checks.check_attention(self._hooks.decoder, NAME)
        if kwargs.get("output_attentions") or getattr(self.base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs attention weights, which softkv never forms: detach the soft prompt or "
                "leave it off"
            )
        if self.training and checkpointing.is_on(self.base):
            if self._hooks.order.repeats:
                raise ValueError(
                    f"{type(self.base).__name__} runs an attention module several times a pass, which a recomputed "
                    "pass can't tell apart: gradient_checkpointing_disable() it"
                )
            for module in self._hooks.decoder.modules():
                checks.check_reentrant(getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}))
