"""The probe of an encoder-decoder at attach time: a few tokens show which attention softkv can replace, and whether a
prefix there is equivalent to the tokens whose keys and values it holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.evaluation import in_evaluation
from softkv.hf.behaviour import same, tolerance
from softkv.hf.context import BlockInputs, BlockOrder, SoftContext
from softkv.hf.encoder_decoder.calls import EncoderDecoderCall
from softkv.hf.encoder_decoder.hooks import EncoderDecoderHooks
from softkv.hf.encoder_decoder.positions import SlotBiases
from softkv.hf.frozen import UnsupportedAttention
from softkv.hf.placement import device_of
from softkv.methods.where import SITES, Site

SOURCE, TARGET = 6, 4  # tokens of encoder and decoder; they differ, so that the number of keys shows cross-attention
_MODEL_ERRORS = (AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
Blocks = dict[Site, list[BlockInputs]]


class EncoderDecoderProbe:
    """Runs a few tokens through the stacks of a base.

    Args:
        hooks: of the base, not yet registered.

    Raises:
        UnsupportedAttention: if the stacks don't run on them.
    """

    def __init__(self, hooks: EncoderDecoderHooks) -> None:
        self.hooks, base = hooks, hooks.base
        self.name, device = type(base).__name__, device_of(base)
        if device.type == "meta":
            raise UnsupportedAttention(
                f'softkv.attach expects an encoder-decoder with values, got {self.name} on "meta": load its weights '
                "first"
            )
        self.encoder, self.decoder = in_evaluation(hooks.encoder), in_evaluation(hooks.decoder)
        needed = {"input_ids", "inputs_embeds", "attention_mask"}
        takes = inspect.signature(hooks.encoder.forward).parameters.keys()
        hooks.reads_tokens = base.main_input_name == "input_ids" and needed <= takes
        # Heads and positions treat these differently.
        special = {getattr(base.config, f"{name}_token_id", None) for name in ("pad", "eos")}
        ids = [token for token in range(SOURCE + 5) if token not in special][:SOURCE]
        vocabulary = base.get_input_embeddings().num_embeddings
        self.ids = torch.tensor([ids], device=device) % vocabulary
        self.targets = self.ids[:, :TARGET].flip(1)
        self.bare = EncoderDecoderCall(hooks)
        try:
            self.states, self.answer = self._run_base(base)
        except _MODEL_ERRORS as error:
            raise UnsupportedAttention(
                f"softkv.attach expects an encoder-decoder whose stacks take the arguments of transformers' own, got "
                f"{self.name}"
            ) from error

    def _run_base(self, base: Any) -> tuple[Tensor, Tensor]:
        """The hidden states of both stacks of the unmodified base."""
        if self.hooks.reads_tokens:
            states = self._encode(self.bare, input_ids=self.ids)
        else:
            width = base.config.get_text_config(decoder=True).hidden_size
            noise = torch.randn(1, SOURCE, width, generator=torch.Generator().manual_seed(0))
            states = noise.to(device_of(base), base.dtype)
        return states, self._decode(self.bare, states)

    def reach(self) -> Blocks:
        """The attention blocks at each site where a prefix works. softkv's attention must be active in the base, and
        the hooks registered.

        Raises:
            UnsupportedAttention: if there is no such block, or results with softkv's attention differ from the base's.
        """
        try:
            found, states, answer = self._run_captured()
        except _MODEL_ERRORS as error:
            raise UnsupportedAttention(
                f"{self.name} does not use transformers' attention interface in a way that softkv can replace "
                f"({type(error).__name__}: {error})"
            ) from error
        if not (same(states[0], self.states[0]) and same(answer[0], self.answer[0])):
            raise UnsupportedAttention(
                f"the results of {self.name} differ with softkv's attention, so it keeps its own"
            )
        if not found:
            raise UnsupportedAttention(
                f"{self.name} does not pass keywords through to transformers' attention interface"
            )
        views = {site: [each.block for each in blocks] for site, blocks in found.items()}
        hooks, reached = self.hooks, dict[Site, list[BlockInputs]]()
        real = {id(module): module for module in (hooks.encoder, hooks.decoder)}
        for view, stack in ((self.encoder, hooks.encoder), (self.decoder, hooks.decoder)):
            real |= {id(module): stack.get_submodule(path) for path, module in view.named_modules()}
        originals = {site: [real[id(block)] for block in blocks] for site, blocks in views.items()}
        hooks.hook_cross(originals.get("cross", []))
        hooks.biases = {site: SlotBiases.of(blocks) for site, blocks in views.items() if site != "cross"}
        for site in [site for site in SITES if site in found]:
            hooks.orders = {site: BlockOrder(views[site])}
            try:
                equivalent = self._prefix_is_equivalent(site, found[site])
            except _MODEL_ERRORS:
                equivalent = False
            if equivalent:
                reached[site] = found[site]
        hooks.orders = {site: BlockOrder(originals[site]) for site in reached}
        hooks.biases = {site: SlotBiases.of(originals[site]) for site in reached if site != "cross"}
        return {
            site: [each._replace(block=block) for each, block in zip(blocks, originals[site], strict=True)]
            for site, blocks in reached.items()
        }

    def probe_inputs(self) -> None:
        """Measure how the encoder treats embeddings and padding, and set `embed_scale` and `behaviour` of the hooks.

        Raises:
            UnsupportedAttention: if it treats padding after a row as tokens.
        """
        hooks = self.hooks
        if not hooks.reads_tokens:
            hooks.behaviour = replace(hooks.behaviour, embeds=False)
            return
        mask = F.pad(torch.ones_like(self.ids), (0, 2))
        try:
            padded = self._encode(self.bare, input_ids=F.pad(self.ids, (0, 2), value=1), attention_mask=mask)
            answer = self._decode(self.bare, padded, encoder_attention_mask=mask)
        except _MODEL_ERRORS as error:
            raise UnsupportedAttention(f"softkv.attach could not run {self.name} on padded rows: {error}") from error
        if not (same(padded[0, :SOURCE], self.states[0]) and same(answer[0], self.answer[0])):
            raise UnsupportedAttention(
                f"softkv.attach expects a model that ignores padding, but {self.name} treats it as tokens"
            )
        for scale in dict.fromkeys((1.0, float(getattr(hooks.encoder, "embed_scale", 1.0)))):
            hooks.embed_scale = scale
            if self._embeds():
                return
        hooks.embed_scale, hooks.behaviour = 1.0, replace(hooks.behaviour, embeds=False)

    def _embeds(self) -> bool:
        """Whether embeddings instead of ids give the same hidden states."""
        # Slightly perturbed, because some models look embeddings up in the vocabulary.
        embeds = self.hooks.embed(self.ids, self.states[0, :1]).detach() * (1 + tolerance(self.states.dtype) / 4)
        try:
            return same(self._encode(self.bare, inputs_embeds=embeds)[0], self.states[0])
        except _MODEL_ERRORS:
            return False

    def _run_captured(self) -> tuple[Blocks, Tensor, Tensor]:
        """The inputs of the attention blocks of both stacks, and the hidden states of both."""
        found: Blocks = {}
        states = self.states
        if self.hooks.reads_tokens:
            states, blocks = self._capture("encoder", lambda call: self._encode(call, input_ids=self.ids))
            found["encoder"] = blocks
        answer, blocks = self._capture("decoder", lambda call: self._decode(call, self.states))
        found["decoder"] = [each for each in blocks if each.key.shape[2] == TARGET and each.causal]
        found["cross"] = [each for each in blocks if each.key.shape[2] == SOURCE and not each.causal]
        return {site: each for site, each in found.items() if each}, states, answer

    def _capture(self, stack: Site, run: Callable[[EncoderDecoderCall], Tensor]) -> tuple[Tensor, list[BlockInputs]]:
        """The hidden states of a stack and the inputs of its blocks; no blocks if it does not pass the keyword on."""
        context = SoftContext(backend=self.hooks.backend, capture=[])
        assert context.capture is not None
        try:
            return run(replace(self.bare, contexts={stack: context})), context.capture
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise
            return run(self.bare), []

    def _prefix_is_equivalent(self, site: Site, blocks: list[BlockInputs]) -> bool:
        """Whether the second half of the tokens gives the same results after the K and V of the first half as after the
        first half itself."""
        if any(len(each.key) != 1 for each in blocks) or len({each.block for each in blocks}) < len(blocks):
            return False
        half = (TARGET if site == "decoder" else SOURCE) // 2
        layers = {n: (each.key[:, :, :half], each.value[:, :, :half]) for n, each in enumerate(blocks)}
        slots = 0 if site == "cross" else half
        context = SoftContext(layers, window_covers=True, slots=slots)
        call = replace(self.bare, contexts={site: context})
        if site == "encoder":
            return same(self._encode(call, input_ids=self.ids[:, half:])[0], self.states[0, half:])
        if site == "decoder":
            answer = self._decode(call, self.states, self.targets[:, half:])
            return same(answer[0], self.answer[0, half:])
        return same(self._decode(call, self.states[:, half:])[0], self.answer[0])

    @torch.no_grad()
    def _encode(self, call: EncoderDecoderCall, **inputs: Tensor) -> Tensor:
        return self._run(call, self.encoder, **inputs)

    @torch.no_grad()
    def _decode(
        self, call: EncoderDecoderCall, states: Tensor, targets: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        ids = self.targets if targets is None else targets
        return self._run(call, self.decoder, input_ids=ids, encoder_hidden_states=states, use_cache=False, **inputs)

    def _run(self, call: EncoderDecoderCall, stack: Any, **inputs: Any) -> Tensor:
        """Hidden states `[1, T, C]` without autocast."""
        with torch.autocast(self.ids.device.type, enabled=False):
            output = self.hooks.run(call, stack, **inputs)
        return output if isinstance(output, Tensor) else output[0]
