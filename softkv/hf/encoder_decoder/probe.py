"""What a few tokens tell of an encoder-decoder: which of its attention softkv reaches, and that a prefix there stands
for the tokens whose keys and values it holds."""

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

READ, WRITTEN = 6, 4  # tokens of the encoder and of the decoder, different: cross-attention shows by its keys
_FAILS = (AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
Blocks = dict[Site, list[BlockInputs]]


class EncoderDecoderProbe:
    """Runs a few tokens through the stacks of a base.

    Args:
        hooks: of the base, not registered yet.

    Raises:
        UnsupportedAttention: when it does not run on them.
    """

    def __init__(self, hooks: EncoderDecoderHooks) -> None:
        self.hooks, base = hooks, hooks.base
        self.name, device = type(base).__name__, device_of(base)
        if device.type == "meta":
            raise UnsupportedAttention(
                f'softkv.attach expects an encoder-decoder with values, got a {self.name} on "meta"'
            )
        self.encoder, self.decoder = in_evaluation(hooks.encoder), in_evaluation(hooks.decoder)
        needed = {"input_ids", "inputs_embeds", "attention_mask"}
        takes = inspect.signature(hooks.encoder.forward).parameters.keys()
        hooks.reads_tokens = base.main_input_name == "input_ids" and needed <= takes
        special = {getattr(base.config, f"{name}_token_id", None) for name in ("pad", "eos")}  # of heads, positions
        ids = [token for token in range(READ + 5) if token not in special][:READ]
        vocabulary = base.get_input_embeddings().num_embeddings
        self.ids = torch.tensor([ids], device=device) % vocabulary
        self.written = self.ids[:, :WRITTEN].flip(1)
        self.bare = EncoderDecoderCall(hooks)
        try:
            self.states, self.answer = self._of_base(base)
        except _FAILS as error:
            raise UnsupportedAttention(
                f"softkv.attach expects an encoder-decoder whose stacks run with the arguments that transformers' own "
                f"take, got {self.name}"
            ) from error

    def _of_base(self, base: Any) -> tuple[Tensor, Tensor]:
        """The states of both stacks as the base has them."""
        if self.hooks.reads_tokens:
            states = self._encode(self.bare, input_ids=self.ids)
        else:
            width = base.config.get_text_config(decoder=True).hidden_size
            noise = torch.randn(1, READ, width, generator=torch.Generator().manual_seed(0))
            states = noise.to(device_of(base), base.dtype)
        return states, self._decode(self.bare, states)

    def reach(self) -> Blocks:
        """The attention blocks at each site, once softkv's attention is in the base and the hooks are registered.

        Raises:
            UnsupportedAttention: when none is reached, or softkv's attention answers otherwise than the base's.
        """
        try:
            found, states, answer = self._seen()
        except _FAILS as error:
            raise UnsupportedAttention(
                f"{self.name} does not take its attention from transformers' attention interface in a way that softkv "
                f"can reach ({type(error).__name__}: {error})"
            ) from error
        if not (same(states[0], self.states[0]) and same(answer[0], self.answer[0])):
            raise UnsupportedAttention(f"{self.name} answers otherwise with softkv's attention, so it keeps its own")
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
                stands = self._stands_for(site, found[site])
            except _FAILS:
                stands = False
            if stands:
                reached[site] = found[site]
        hooks.orders = {site: BlockOrder(originals[site]) for site in reached}
        hooks.biases = {site: SlotBiases.of(originals[site]) for site in reached if site != "cross"}
        return {
            site: [each._replace(block=block) for each, block in zip(blocks, originals[site], strict=True)]
            for site, blocks in reached.items()
        }

    def tokens(self) -> None:
        """Tells the hooks what the encoder does with embeddings and padding.

        Raises:
            UnsupportedAttention: when it takes padding behind a row for tokens.
        """
        hooks = self.hooks
        if not hooks.reads_tokens:
            hooks.behaviour = replace(hooks.behaviour, embeds=False)
            return
        mask = F.pad(torch.ones_like(self.ids), (0, 2))
        try:
            padded = self._encode(self.bare, input_ids=F.pad(self.ids, (0, 2), value=1), attention_mask=mask)
            behind = self._decode(self.bare, padded, encoder_attention_mask=mask)
        except _FAILS as error:
            raise UnsupportedAttention(f"softkv.attach could not run {self.name} on padded rows: {error}") from error
        if not (same(padded[0, :READ], self.states[0]) and same(behind[0], self.answer[0])):
            raise UnsupportedAttention(
                f"softkv.attach expects padding that changes nothing, {self.name} takes it for tokens"
            )
        for scale in dict.fromkeys((1.0, float(getattr(hooks.encoder, "embed_scale", 1.0)))):
            hooks.embed_scale = scale
            if self._embeds():
                return
        hooks.embed_scale, hooks.behaviour = 1.0, replace(hooks.behaviour, embeds=False)

    def _embeds(self) -> bool:
        """Whether embeddings in place of ids give the same row."""
        # Not quite those of the vocabulary, in which some models would look them up.
        embeds = self.hooks.embed(self.ids, self.states[0, :1]).detach() * (1 + tolerance(self.states.dtype) / 4)
        try:
            return same(self._encode(self.bare, inputs_embeds=embeds)[0], self.states[0])
        except _FAILS:
            return False

    def _seen(self) -> tuple[Blocks, Tensor, Tensor]:
        """What reaches the attention of both stacks, and their states."""
        found: Blocks = {}
        states = self.states
        if self.hooks.reads_tokens:
            states, blocks = self._captured("encoder", lambda call: self._encode(call, input_ids=self.ids))
            found["encoder"] = blocks
        answer, blocks = self._captured("decoder", lambda call: self._decode(call, self.states))
        found["decoder"] = [each for each in blocks if each.key.shape[2] == WRITTEN and each.causal]
        found["cross"] = [each for each in blocks if each.key.shape[2] == READ and not each.causal]
        return {site: each for site, each in found.items() if each}, states, answer

    def _captured(self, stack: Site, run: Callable[[EncoderDecoderCall], Tensor]) -> tuple[Tensor, list[BlockInputs]]:
        """The states of a stack, and what reaches its blocks; nothing where it does not take the keyword."""
        context = SoftContext(backend=self.hooks.backend, capture=[])
        assert context.capture is not None
        try:
            return run(replace(self.bare, contexts={stack: context})), context.capture
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise
            return run(self.bare), []

    def _stands_for(self, site: Site, blocks: list[BlockInputs]) -> bool:
        """Whether the K and V of the first half of the tokens, as a prefix, stand for it in front of the rest."""
        if any(len(each.key) != 1 for each in blocks) or len({each.block for each in blocks}) < len(blocks):
            return False
        half = (WRITTEN if site == "decoder" else READ) // 2
        layers = {n: (each.key[:, :, :half], each.value[:, :, :half]) for n, each in enumerate(blocks)}
        slots = 0 if site == "cross" else half
        context = SoftContext(layers, window_covers=True, slots=slots)
        call = replace(self.bare, contexts={site: context})
        if site == "encoder":
            return same(self._encode(call, input_ids=self.ids[:, half:])[0], self.states[0, half:])
        if site == "decoder":
            answer = self._decode(call, self.states, self.written[:, half:])
            return same(answer[0], self.answer[0, half:])
        return same(self._decode(call, self.states[:, half:])[0], self.answer[0])

    @torch.no_grad()
    def _encode(self, call: EncoderDecoderCall, **inputs: Tensor) -> Tensor:
        return self._run(call, self.encoder, **inputs)

    @torch.no_grad()
    def _decode(
        self, call: EncoderDecoderCall, states: Tensor, written: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        ids = self.written if written is None else written
        return self._run(call, self.decoder, input_ids=ids, encoder_hidden_states=states, use_cache=False, **inputs)

    def _run(self, call: EncoderDecoderCall, stack: Any, **inputs: Any) -> Tensor:
        """States `[1, T, C]`, in the model's own precision."""
        with torch.autocast(self.ids.device.type, enabled=False):
            output = self.hooks.run(call, stack, **inputs)
        return output if isinstance(output, Tensor) else output[0]
