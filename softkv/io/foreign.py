"""Prefixes of other training code, as safetensors: those of the P-tuning v2 repository, and HazyResearch's cartridges.

Both save pickles; docs/interop.md has a short script, outside softkv, that converts them to the safetensors read here.

- P-tuning v2 (THUDM/P-tuning-v2, model/prefix_encoder.py): `prefix_encoder.embedding.weight`, a flat prefix `[P,
  2·L·G·D]` (`softkv.io.flat`); or with prefix projection an `embedding.weight [P, C]` and an MLP of `trans.0` and
  `trans.2` with a tanh between, which computes one. The file may contain other tensors of the model.
- Cartridges (HazyResearch/cartridges, cartridges/cache.py): for each layer `trainable_keys.{l}` and
  `trainable_values.{l}` `[1, G, P, D]` (or Dv), with `frozen_keys.{l}` and `frozen_values.{l}` (`fixed_` in older
  files) in front of them. Keys as attention sees them; tokens begin at position P.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softkv.io.flat import FLAT
from softkv.io.safe_files import read_tensors
from softkv.methods import PTuningV2

_ENCODER = "prefix_encoder."
_MOST_SLOTS = 64  # per hidden unit of an encoder: more would be far larger than the file
_CARTRIDGE = re.compile(r"(trainable|frozen|fixed)_(keys|values)\.(\d{1,4})")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a converted file, as returned by `softkv.io.checkpoint.read`.

    Raises:
        ValueError: if the file is damaged or of neither kind.
    """
    _, tensors = read_tensors(path)
    encoder = {name.rpartition(_ENCODER)[2]: tensor for name, tensor in tensors.items() if _ENCODER in name}
    if encoder:
        kind, flat = "P-tuning v2 repository", _encoded(encoder, path)
        # The authors' models have no windows; in PEFT, which adopted the layout, windows count the slots.
        found, length, window_covers = {FLAT: flat}, len(flat), True
    elif all(map(_CARTRIDGE.fullmatch, tensors)) and tensors:
        kind, found, window_covers = "cartridge", _cartridge(tensors, path), False
        length = found["k"].shape[3]
    else:
        raise ValueError(
            f"{path} is neither a prefix encoder of the P-tuning v2 repository ({_ENCODER}embedding.weight) nor a "
            f"cartridge (trainable_keys.0, ...): it contains {', '.join(sorted(tensors)[:5]) or 'nothing'}"
        )
    method = PTuningV2(length=length, window_covers=window_covers)
    config = {"format": kind, "method": "p-tuning-v2", "config": asdict(method), "folded": True, "base": {"name": ""}}
    return config, found


def _encoded(encoder: Mapping[str, Tensor], path: Path) -> Tensor:
    """The flat prefix `[P, 2·L·G·D]` that a prefix encoder computes."""
    mlp = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    expected = {"embedding.weight", *(mlp if len(encoder) > 1 else ())}
    if set(encoder) != expected:
        raise ValueError(
            f"{path} expects {', '.join(sorted(expected))} in {_ENCODER}*, got {', '.join(sorted(encoder))}"
        )
    embedding = encoder["embedding.weight"].float()
    if len(encoder) == 1:
        return embedding
    weight, bias, last_weight, last_bias = (encoder[name].float() for name in mlp)
    if len(embedding) > _MOST_SLOTS * len(weight):
        raise ValueError(f"{path} has a prefix encoder of {len(embedding)} slots and only {len(weight)} hidden units")
    try:
        return torch.tanh(embedding @ weight.T + bias) @ last_weight.T + last_bias
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(encoder.items()))
        raise ValueError(f"{path} has a prefix encoder with inconsistent shapes: {shapes}") from error


def _cartridge(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """K `[L, 1, G, P, D]` and V `[L, 1, G, P, Dv]` of a trained cache."""
    layers = 1 + max(int(name.rpartition(".")[2]) for name in tensors)
    front = "fixed" if "fixed_keys.0" in tensors else "frozen"
    parts = [part for part in (front, "trainable") if f"{part}_keys.0" in tensors]
    expected = {f"{part}_{kind}.{l}" for part in parts for kind in ("keys", "values") for l in range(layers)}
    if expected != tensors.keys():
        differing = sorted(expected ^ tensors.keys())
        raise ValueError(f"{path} expects keys and values of the same kinds in every layer, got {differing[:4]}")
    found = {}
    for name, kind in (("k", "keys"), ("v", "values")):
        try:
            whole = [torch.cat([tensors[f"{part}_{kind}.{l}"] for part in parts], 2) for l in range(layers)]
            found[name] = torch.stack(whole)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{path} has {kind} that don't fit together: {error}") from error
    shape = found["k"].shape
    if len(shape) != 5 or shape[1] != 1 or found["v"].shape[:4] != shape[:4]:
        raise ValueError(
            f"{path} expects keys [1, G, P, D] and values [1, G, P, Dv] in every layer, got {tuple(shape[1:])} and "
            f"{tuple(found['v'].shape[1:])}"
        )
    return found
