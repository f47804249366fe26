"""Devices and formats of a base: offloaded, on "meta", sharded or quantised."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_PACKS = "support_avx512bf16_for_cpu"


def device_of(base: Any) -> torch.device:
    """The device that a base takes its inputs on. Parameters that accelerate keeps elsewhere, in memory or on disk, are
    on "meta" between forward passes, as those of a base without values are."""
    device = base.device
    hook = getattr(base.get_input_embeddings(), "_hf_hook", None)
    if device.type != "meta" or hook is None:
        return device
    found = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,))]
    return next((torch.device(each) for each in found if each is not None), device)


def is_sharded(base: nn.Module) -> bool:
    """Whether FSDP shards a base by blocks. Gradients then enter a block by what it returns alone: those of what else
    is taken out of it (K and V of a head run once) would find its weights gone."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and needed by nobody who has not
    if fsdp is None:
        return False
    return any(isinstance(each, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for each in base.modules())


def check_not_partitioned(module: nn.Module) -> None:
    """Raise where DeepSpeed ZeRO-3 holds parameters: it brings them together for modules that run, and what is learned
    is read without one."""
    if "deepspeed" in sys.modules and any(hasattr(each, "ds_id") for each in module.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 has partitioned this model, which softkv can't read: shard it by FSDP2 (fully_shard)"
        )


def check_rows_are_whole() -> None:
    """Raise within torch's `context_parallel`, which splits rows over processes and has torch's own attention, and no
    other, bring them together."""
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if module.startswith("torch.distributed"):
        raise ValueError(
            "context_parallel splits rows over processes, and softkv attention would see the part of one process only: "
            "leave it out (tensor parallelism, FSDP2 and gradient checkpointing make room for long rows)"
        )


def keep_differentiable(base: nn.Module) -> list[nn.Module]:
    """Has quantised layers keep the form that gradients flow through, and returns those that would not have.

    On CPUs with AVX-512 bf16, bitsandbytes packs 4-bit weights for inference at the first forward in evaluation, for
    good: gradients past such a layer are lost without a word. compressed-tensors unpacks what it loaded at the first
    call of the whole base, which a call of its decoder does not see.
    """
    unpacks = getattr(base, "ct_decompress_hook", None)
    if unpacks is not None:
        base._forward_pre_hooks[unpacks.id](base, ())
    found = [module for module in base.modules() if getattr(module, _PACKS, False)]
    for module in found:
        setattr(module, _PACKS, False)
        module.state_dict()  # gives what is packed already its usual form back
    return found


def free_to_pack(layers: list[nn.Module]) -> None:
    """Undoes `keep_differentiable`."""
    for module in layers:
        setattr(module, _PACKS, True)
