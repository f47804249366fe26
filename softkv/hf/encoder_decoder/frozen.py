"""An encoder-decoder as methods see it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from softkv.evaluation import in_evaluation
from softkv.hf.context import BlockInputs, SoftContext
from softkv.hf.encoder_decoder.calls import EncoderDecoderCall
from softkv.hf.encoder_decoder.hooks import EncoderDecoderHooks
from softkv.hf.frozen import FrozenBase
from softkv.hf.placement import device_of
from softkv.methods.base import layers_like
from softkv.methods.where import SITES, Site
from softkv.prefix import Prefix


class FrozenEncoderDecoder(FrozenBase):
    """The `softkv.methods.base.FrozenModel` of an encoder-decoder.

    Args:
        hooks: of the model.
        blocks: the attention blocks at each site that softkv can replace.
        tokenizer: for text inits, or None.
    """

    def __init__(
        self, hooks: EncoderDecoderHooks, blocks: Mapping[Site, Sequence[BlockInputs]], tokenizer: Any = None
    ) -> None:
        self.hooks = hooks
        self.widths = {site: [each.widths for each in blocks[site]] for site in SITES if site in blocks}
        self.where = tuple(self.widths)
        super().__init__(hooks.base, [widths for each in self.widths.values() for widths in each], tokenizer)

    def at(self, where: Sequence[Site]) -> FrozenEncoderDecoder:
        """The same model, restricted to the attention at some sites.

        Raises:
            ValueError: if softkv can't replace the attention at one of them.
        """
        if missing := [site for site in where if site not in self.widths]:
            raise ValueError(
                f"softkv can't replace the attention {', '.join(map(repr, missing))} of {type(self.model).__name__}: "
                f"expected where to contain only {', '.join(map(repr, self.widths)) or 'nothing'}, got {tuple(where)}"
            )
        other = copy.copy(self)
        other.where = tuple(where)
        widths = [widths for site in where for widths in self.widths[site]]
        other.shape = replace(self.shape, **layers_like(widths))
        return other

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Frozen input embeddings, scaled as the encoder scales them."""
        return super().embed(ids) * self.hooks.embed_scale

    @torch.no_grad()
    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        """The K/V of tokens read by both stacks, as initial values: they are not equivalent to those tokens in context.
        A decoder with a smaller vocabulary reads the ids modulo its size."""
        if not self.hooks.reads_tokens:
            raise ValueError(
                f"the encoder of {type(self.model).__name__} reads no tokens that could initialise a prefix: expected "
                "init_std=0.1 (random values)"
            )
        self.hooks.check_positions("encoder", len(ids) - 1)
        self.hooks.check_positions("decoder", len(ids) - 1)
        given = ids[None].to(device_of(self.model))
        encoder, decoder = in_evaluation(self.hooks.encoder), in_evaluation(self.hooks.decoder)
        captured: list[BlockInputs] = []
        context = SoftContext(backend=self.hooks.backend, capture=captured)
        call = EncoderDecoderCall(self.hooks, contexts={"encoder": context, "decoder": context, "cross": context})
        states = self.hooks.run(call, encoder, input_ids=given)[0]
        at_encoder = len(captured)
        written = given % len(cast(Any, decoder).get_input_embeddings().weight)
        self.hooks.run(call, decoder, input_ids=written, encoder_hidden_states=states, use_cache=False)
        found = {
            "encoder": captured[:at_encoder],
            "decoder": [each for each in captured[at_encoder:] if each.causal],
            "cross": [each for each in captured[at_encoder:] if not each.causal],
        }
        of_sites = [each for site in self.where for each in found[site]]
        return Prefix.from_layers([each.key for each in of_sites], [each.value for each in of_sites])
