"""Encoder-decoders: an encoder row and a decoder row, with a prefix in every kind of attention.

The reference is the bare model with transformers' eager attention, one pair at a time without padding: soft tokens as
embeddings that the encoder reads, the decoder's prefix in its cache, the others concatenated to keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.methods.base import SoftPrompt
from softkv.methods.where import SITES, Site, where_of
from softkv.prefix import Prefix

from . import truth
from .causal import STEPS, generation_options
from .methods import Subject, Trials
from .rows import Batch, Row, padded
from .verdicts import outcome, verdict

START, WIDTH = 1, 12  # what a decoder begins with, and how long its rows are
_SELF = ("self_attn", "SelfAttention", ".attention.self")
_NAMES: dict[Site, tuple[str, ...]] = {
    "encoder": _SELF,
    "decoder": _SELF,
    "cross": ("encoder_attn", "EncDecAttention", "cross_attn", "cross_attention", "crossattention.self"),
}
Slots = dict[torch.nn.Module, tuple[Site, Tensor, Tensor]]  # of attention modules: k and v [1, G, P, D]


class Pairs(Subject):
    """Logits `[T, V]` of what is written."""

    where: tuple[Site, ...] = SITES

    def bare(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, decoder_input_ids=torch.tensor([written(ids[0].tolist())])).logits[0]

    def learned(self, soft: Any) -> SoftPrompt:
        self.where = where_of(soft.method) or ()
        return soft.soft

    def alone(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        target = written(row.ids)
        return self._alone(bare, soft, row, behind(target))[: len(target)]

    def _alone(self, bare: Any, soft: SoftPrompt, row: Row, target: list[int]) -> Tensor:
        ids, tokens, prefix = torch.tensor(row.ids), soft.soft_tokens(), soft.prefix()
        read = bare.get_input_embeddings()(ids.clamp(min=0)) * _scale(bare)
        if tokens is not None and soft.placement == "inline":
            read = torch.stack([tokens[-i - 1] if i < 0 else read[at] for at, i in enumerate(row.ids)])
        elif tokens is not None:
            read = torch.cat([tokens, read] if soft.placement == "before" else [read, tokens])
        slots = {} if prefix is None else self._slots(bare, prefix)
        shift = prefix.length if prefix is not None and "encoder" in self.where else 0
        with concatenated(bare, slots), moved(bare.get_encoder(), shift):
            encoder = bare.get_encoder()
            places = {"position_ids": shift + torch.arange(len(read))[None]} if takes(encoder, "position_ids") else {}
            states = encoder(inputs_embeds=read[None], attention_mask=torch.ones(1, len(read)).long(), **places)
            cache = filled(slots)
            output = bare(
                encoder_outputs=states, attention_mask=torch.ones(1, len(read)).long(),
                decoder_input_ids=torch.tensor([target]), past_key_values=cache, use_cache=cache is not None,
            )  # fmt: skip
        return output.logits[0]

    def batch(self, given: list[Row], side: str) -> Batch:
        batch, _ = padded(given, side)
        targets = [written(row.ids) for row in given]
        batch["decoder_input_ids"] = torch.tensor([behind(target) for target in targets])
        return batch, lambda x: [x[r, : len(target)] for r, target in enumerate(targets)]

    def answers(self, output: Any) -> Tensor:
        return output.logits

    def trials(self, bare: Any, soft: Any, given: list[Row], wanted: list[Tensor]) -> Trials:
        def generated() -> str:
            said = outcome(partial(self._generate, bare, soft, given))
            if said.startswith(("crash", "wrong")) and not self._base_generates(bare):
                return "base: its own generate does not take padded rows like this"
            return said

        return {"generate": generated}

    @torch.no_grad()
    def _generate(self, bare: Any, soft: Any, given: list[Row]) -> str:
        """Whether rows are answered as everything recomputed would be."""
        batch, _ = padded(given, "right")
        out = soft.generate(**batch, **generation_options(None, STEPS))
        got, sequences = torch.stack(out.logits, 1), out.sequences[:, :-1].tolist()
        wanted = [self._alone(bare, soft.soft, row, one)[-STEPS:] for row, one in zip(given, sequences, strict=True)]
        return verdict(list(got), wanted)

    @torch.no_grad()
    def _base_generates(self, bare: Any) -> bool:
        ids, mask = torch.arange(5, 13).view(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        try:
            out = bare.generate(input_ids=ids, attention_mask=mask, **generation_options(None, 3))
            wanted = bare(input_ids=ids[:1, :3], decoder_input_ids=out.sequences[:1, :-1]).logits[0, -3:]
        except Exception:
            return False
        return verdict([torch.stack(out.logits, 1)[0]], [wanted]) == "ok"

    def _slots(self, bare: Any, prefix: Prefix) -> Slots:
        """What stands before the keys of each attention module, in the order of `where`: encoder, decoder, cross."""
        modules = attention_modules(bare)
        chosen = [(site, module) for site in SITES if site in self.where for module in modules[site]]
        layers = prefix.layers(len(chosen))
        return {module: (site, k, v) for (site, module), (k, v) in zip(chosen, layers, strict=True)}


def written(ids: list[int]) -> list[int]:
    """What the decoder has written of a row: as long as what the encoder reads, but for its last token."""
    return [START, *(abs(i) + 1 for i in ids[:-2])]


def behind(target: list[int]) -> list[int]:
    """With padding behind it: ProphetNet's decoder answers by how long its row is."""
    return target + [0] * (WIDTH - len(target))


def attention_modules(model: Any) -> dict[Site, list[torch.nn.Module]]:
    stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder(), "cross": model.get_decoder()}
    return {
        site: [module for name, module in stacks[site].named_modules() if name.endswith(_NAMES[site])] for site in SITES
    }


@contextmanager
def concatenated(bare: Any, slots: Slots) -> Iterator[None]:
    """Keys and values of encoder and cross-attention behind their slots; a position bias is 0 at all slots."""

    def attend(eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if module in slots:
            site, k, v = slots[module]
            length, bias = k.shape[2], options.get("position_bias")
            if site != "decoder":
                key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
                mask = mask if mask is None else F.pad(mask, (length, 0))
            if bias is not None:
                bias = bias if site != "decoder" else bias[..., length:]
                options["position_bias"] = F.pad(bias, (length, 0))
        return eager(module, query, key, value, mask, **options)

    with truth.attending(bare, attend):
        yield


@contextmanager
def moved(encoder: Any, shift: int) -> Iterator[None]:
    """Tokens stand `shift` rows further on in an encoder's table of positions that takes no position ids."""
    tables = {} if takes(encoder, "position_ids") else dict(encoder.named_modules())
    table = next((module for name, module in tables.items() if name.endswith("embed_positions")), None)
    name = "weight" if isinstance(table, torch.nn.Embedding) else "weights"
    if table is None or shift == 0:
        yield
        return
    held = getattr(table, name)
    setattr(table, name, torch.nn.Parameter(held[shift:]) if name == "weight" else held[shift:])
    try:
        yield
    finally:
        setattr(table, name, held)


def filled(slots: Slots) -> Any:
    """A cache that holds the decoder's prefix, or None."""
    from transformers import DynamicCache, EncoderDecoderCache

    held = [(k, v) for site, k, v in slots.values() if site == "decoder"]
    if not held:
        return None
    cache = DynamicCache()
    for layer, (k, v) in enumerate(held):
        cache.update(k, v, layer)
    return EncoderDecoderCache(cache, DynamicCache())


def takes(module: Any, name: str) -> bool:
    return name in signature(module.forward).parameters


def _scale(bare: Any) -> float:
    """What an encoder multiplies embeddings of ids by, and not those that it is given."""
    return float(getattr(bare.get_encoder(), "embed_scale", 1.0))
