"""Devices and formats of a base: offloaded, on "meta", sharded or quantised."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_PACKS = "support_avx512bf16_for_cpu"


def device_of(base: Any) -> torch.device:
    """The device of a base's inputs. Parameters that accelerate offloads to memory or disk are on "meta" between
    forward passes, like those of a base without values."""
    device = base.device
    hook = getattr(base.get_input_embeddings(), "_hf_hook", None)
    if device.type != "meta" or hook is None:
        return device
    found = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,))]
    return next((torch.device(each) for each in found if each is not None), device)


def is_sharded(base: nn.Module) -> bool:
    """Whether FSDP shards a base by blocks. Gradients may then enter a block only through its return value: for other
    tensors taken out of it (K and V of a head computed once), its weights would already be freed."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, so only if it already is
    if fsdp is None:
        return False
    return any(isinstance(each, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for each in base.modules())


def check_not_partitioned(module: nn.Module) -> None:
    """Raise if DeepSpeed ZeRO-3 partitions parameters: it gathers them only for running modules, and learned parameters
    are read outside one."""
    if "deepspeed" in sys.modules and any(hasattr(each, "ds_id") for each in module.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 has partitioned this model, which softkv can't read: shard it with FSDP2 (fully_shard)"
        )


def check_rows_are_whole() -> None:
    """Raise within torch's `context_parallel`, which splits rows over processes; only torch's own attention combines
    them."""
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if module.startswith("torch.distributed"):
        raise ValueError(
            "context_parallel splits rows over processes, and softkv attention would see one process's part only: "
            "leave it out (tensor parallelism, FSDP2 and gradient checkpointing save memory for long rows)"
        )


def keep_differentiable(base: nn.Module) -> list[nn.Module]:
    """Make quantised layers keep the layout that supports gradients, and return the layers that were changed.

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
        module.state_dict()  # restores the usual layout of weights already packed
    return found


def free_to_pack(layers: list[nn.Module]) -> None:
    """Undo `keep_differentiable`."""
    for module in layers:
        setattr(module, _PACKS, True)
