"""Tensor parallelism of a base: each process runs a part of the heads, with the same part of a prefix's heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softkv.hf.context import BlockInputs, LayerKV
from softkv.hf.placement import is_sharded
from softkv.methods.base import SoftMatrices
from softkv.methods.sharded import is_sharded_tensor
from softkv.prefix import Prefix

_HEADS = -3  # the axis G of `[..., G, P, D]`


@dataclass(frozen=True)
class TensorParallel:
    """The processes over which a base is split.

    Attributes:
        mesh: their one-dimensional `DeviceMesh`.
        splits: whether each process runs a part of the key/value heads, or all of them (if a plan gathers projections).
    """

    mesh: Any
    splits: bool

    @classmethod
    def of(cls, base: Any, blocks: Sequence[BlockInputs]) -> TensorParallel | None:
        """The processes of a base with these attention blocks; None for a single process or a base sharded by FSDP.

        Raises:
            ValueError: if heads are split unevenly, or in some blocks only.
        """
        mesh = next((each.device_mesh for each in base.parameters() if hasattr(each, "device_mesh")), None)
        if mesh is not None and mesh.ndim > 1:
            mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else None
        elif is_sharded(base):
            mesh = None
        if mesh is None:
            return None
        heads, here = _heads_of(base.config.get_text_config()), {each.key.shape[1] for each in blocks}
        if here == {heads}:
            return cls(mesh, splits=False)
        if heads is None or {each * mesh.size() for each in here} != {heads}:
            raise ValueError(
                f"softkv expects tensor parallelism that gives each of {mesh.size()} processes as many of the {heads} "
                f"key/value heads of {type(base).__name__}, got {sorted(here)}"
            )
        return cls(mesh, splits=True)

    def whole_widths(self, widths: tuple[int, int, int]) -> tuple[int, int, int]:
        """(G, D, Dv) of a block over all processes."""
        return (widths[0] * (self.mesh.size() if self.splits else 1), *widths[1:])

    def own(self, prefix: Prefix) -> Prefix:
        """This process's heads of a prefix. The gradient of what all processes hold is whole in each."""
        return prefix.map(self._own) if self.splits else prefix

    def own_of_layer(self, kv: LayerKV) -> LayerKV:
        """Like `own`, for K and V of one layer."""
        return (self._own(kv[0]), self._own(kv[1])) if self.splits else kv

    def whole(self, tensor: Tensor) -> Tensor:
        """All heads of `[..., G, P, D]`, without gradient; every process must call."""
        if not self.splits:
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(tensor, self.mesh, [Shard(tensor.dim() + _HEADS)], run_check=False).full_tensor()

    @contextmanager
    def drawing_alike(self) -> Iterator[None]:
        """Make all processes draw the first one's random numbers in this context, because initial values may be run
        through the base by all of them together."""
        mine = torch.get_rng_state()
        drawn = mine.to(self.mesh.device_type)
        dist.broadcast(drawn, group=self.mesh.get_group(), group_src=0)
        torch.set_rng_state(drawn.cpu())
        try:
            yield
        finally:
            if self.mesh.get_local_rank() > 0:
                torch.set_rng_state(mine)

    def share(self, learned: nn.Module) -> None:
        """Give all processes the first one's values. Plain K and V matrices are split by heads, as the base is; other
        parameters are replicated."""
        from torch.distributed.tensor import Shard, distribute_tensor

        if isinstance(learned, SoftMatrices) and self.splits:
            for name, value in list(learned.named_parameters()):
                split = distribute_tensor(value.detach(), self.mesh, [Shard(value.dim() + _HEADS)])
                setattr(learned, name, nn.Parameter(split, requires_grad=value.requires_grad))
            return
        for tensor in learned.state_dict().values():
            dist.broadcast(tensor, group=self.mesh.get_group(), group_src=0)

    def _own(self, tensor: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not is_sharded_tensor(tensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return tensor.redistribute(placements=[Shard(tensor.dim() + _HEADS)]).to_local()


def check_even(base: Any) -> None:
    """Raise if the heads of a base can't be split evenly over its processes."""
    size, heads = getattr(base, "_tp_size", None) or 1, _heads_of(base.config.get_text_config())
    if heads is not None and heads % size:
        raise ValueError(
            f"tensor parallelism splits the {heads} key/value heads of {type(base).__name__} over {size} processes: "
            "expected a tp_size that divides them"
        )


def _heads_of(config: Any) -> int | None:
    """The number of key/value heads in a config."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
