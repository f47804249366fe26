"""Models whose heads are split over processes beside the same models in one, as a part of `sharded_runs`."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

import softkv
from softkv.io import checkpoint
from tests.hf.tiny import METHODS, model_of, tokenizer

IDS = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 9, 2]])


def base_of(folder: str, name: str, **changes: Any) -> Any:
    place = os.path.join(folder, "models", name.partition(":")[0])
    if dist.get_rank() == 0:
        model_of(name, **changes).save_pretrained(place)
    dist.barrier()
    options = {"distributed_config": DistributedConfig(tp_size=2)}
    return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)


def pair(folder: str, name: str, method: Any) -> list[softkv.SoftModel]:
    """A split model and a whole one, whose processes draw other random numbers."""
    pair = []
    for base, seed in ((base_of(folder, name), 1 + dist.get_rank()), (model_of(name), 1)):
        torch.manual_seed(seed)
        pair.append(softkv.attach(base, method, tokenizer=tokenizer()).eval())
    return pair


def answers_alike(folder: str, name: str) -> bool:
    found = []
    for method in ("p-tuning v2", "prompt-tuning before", "p-tuning v2 encoder"):
        given = {"attention_mask": (IDS > 0).long(), "max_new_tokens": 4, "do_sample": False}
        split, one = (each.generate(IDS, **given) for each in pair(folder, name, METHODS[method]))
        found.append(torch.equal(split, one))
    return all(found)


def rows_of_their_own(folder: str) -> bool:
    names = ["default", "tokens", "shared", "encoder", None]
    logits = []
    for each in pair(folder, "Llama", METHODS["p-tuning v2 of a text"]):
        for name, method in (
            ("tokens", softkv.PromptTuning(length=2)),
            ("shared", METHODS["prefix-tuning"]),
            ("encoder", METHODS["p-tuning v2 encoder"]),
        ):
            torch.manual_seed(3)
            each.add_adapter(name, method)
        logits.append(each(torch.tensor([[1, 5, 6, 7, 8]] * 5), adapter_names=names).logits)
    return torch.allclose(*logits, atol=2e-5)


def saved_ones_load(folder: str) -> bool:
    split, one = pair(folder, "Llama", METHODS["p-tuning v2"])
    place = os.path.join(folder, "adapter of one")
    if dist.get_rank() == 0:
        one.save_pretrained(place)
    dist.barrier()
    with torch.no_grad():
        split.soft.k.zero_()
    checkpoint.restore(split, place)
    loaded = softkv.load(base_of(folder, "Llama"), place)
    return all(torch.allclose(each(IDS).logits, one(IDS).logits, atol=2e-5) for each in (split, loaded))


def texts_are_whole(folder: str) -> bool:
    split, one = (
        softkv.Prefix.from_text(each, tokenizer(), "w4 w5") for each in pair(folder, "Llama", METHODS["p-tuning v2"])
    )
    return torch.allclose(split.k, one.k, atol=2e-5) and torch.allclose(split.v, one.v, atol=2e-5)


def uneven_heads_are_refused(folder: str) -> bool:
    base = base_of(folder, "Llama", num_key_value_heads=1)
    with pytest.raises(ValueError, match="splits the 1 key/value heads of LlamaForCausalLM over 2 processes"):
        softkv.attach(base, softkv.PTuningV2(length=3))
    return True


def shards_are_refused(folder: str) -> bool:
    base = model_of("Llama")
    for block in base.model.layers:
        fully_shard(block)
    with pytest.raises(ValueError, match="FSDP has sharded this LlamaForCausalLM already: attach every soft prompt"):
        softkv.attach(base, softkv.PTuningV2(length=3))
    return True


_MODELS = ("Llama", "Qwen3: q/k-norm, head_dim is not C/H", "Gemma2: softcap, alternating windows")
_MODELS += ("Phi3: fused projections", "GPTNeoX: parallel residual, partial rotary")
CASES: dict[str, Callable[[str], bool]] = {
    name: lambda folder, name=name: answers_alike(folder, name) for name in _MODELS
}
CASES |= {
    each.__name__: each
    for each in (rows_of_their_own, saved_ones_load, texts_are_whole, uneven_heads_are_refused, shards_are_refused)
}
