"""Rows that encoder-decoders read and write."""

from typing import Any

import torch
from torch import Tensor

import softkv
from softkv.methods.base import Method
from tests.hf.encoder_decoders import EOS, KV, model_of, self_attention

READ = [[5, 6, 7, 8, 9, EOS], [10, 11, EOS], [12, 13, 14, 15, EOS]]
WRITTEN = [[4, 5, EOS], [7, EOS], [20, 21, 22, EOS]]


def labels_of(written: list[list[int]]) -> Tensor:
    width = max(map(len, written))
    return torch.tensor([row + [-100] * (width - len(row)) for row in written])


METHODS: dict[str, Method] = {
    "v2 everywhere": softkv.PTuningV2(length=5, init_std=1.0),
    "v2 in the decoder": softkv.PTuningV2(length=5, init_std=1.0, where=("decoder",)),
    "v2 in the encoder": softkv.PTuningV2(length=5, init_std=1.0, where="encoder"),
    "v2 across": softkv.PTuningV2(length=5, init_std=1.0, where=("cross",)),
    "prefix-tuning": softkv.PrefixTuning(length=4, init_std=1.0, where=("cross", "decoder")),
    "prompt-tuning before": softkv.PromptTuning(length=3, position="before"),
    "prompt-tuning after": softkv.PromptTuning(length=3),
    "p-tuning": softkv.PTuning(template="[P1] [X] [P2] [Y]", encoder_size=8),
}


def attached(name: str, method: Method, **options: Any) -> softkv.SoftModel:
    torch.manual_seed(1)
    return softkv.attach(model_of(name, dtype=torch.float64, **options), method).double()


def rows_of(method: Method) -> list[list[int]]:
    return [[-1, *row[:2], -2, *row[2:]] for row in READ] if isinstance(method, softkv.PTuning) else READ


def sites_of(model: Any) -> dict[str, KV]:
    """K and V `[G, P, D]` of each block at each site, as the method's documentation lays them out."""
    prefix, base = model.soft.prefix(), model.base
    if prefix is None:
        return {}
    encoder, decoder = (len(self_attention(stack)) for stack in (base.get_encoder(), base.get_decoder()))
    counts = {"encoder": encoder, "decoder": decoder, "cross": decoder}
    total = sum(counts[site] for site in model.method.where)
    layers = iter([(k[0], v[0]) for k, v in prefix.layers(total)])
    return {site: [next(layers) for _ in range(counts[site])] for site in ("encoder", "decoder", "cross")
            if site in model.method.where}  # fmt: skip
