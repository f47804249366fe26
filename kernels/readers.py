"""The tokens that read each prefix, grouped without leaving the device: fixed shapes, a stable sort, no wait for the
host.

Group a is `order[start[a] : start[a + 1]]`, flat tokens. Without `order` the tokens lie in order of their groups;
without `start`, too, all tokens read the one prefix (SHARED), or group a is the T tokens of row a. Rows that read no
prefix form a last group, number A.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.launch import Tensors
from softkv.kernels.problem import Problem, row_of_token

FAR = 2**32  # between the groups' places in one sorted line


@triton.jit
def group_extent(a, exists, ptr, T, count, SHARED: tl.constexpr):
    """(first token, tokens) of the groups `a`; of those that don't exist, nothing."""
    if ptr.start is not None:
        first = tl.load(ptr.start + a, mask=exists, other=0)
        return first, tl.load(ptr.start + a + 1, mask=exists, other=0) - first
    elif SHARED:
        return a * 0, tl.where(exists, count, 0)
    else:
        return a * T, tl.where(exists, T, 0)


class Readers:
    """A step that groups a call's tokens, and what it leaves: the fields `order`, `start`, `seen` named in `fields`."""

    def __init__(self, problem: Problem, by_position: bool):
        self.problem = problem
        self.indexed = "prefix_index" in problem.given
        self.by_position = by_position and "position" in problem.given
        if self.by_position:
            self.fields = ["order", "start", "seen"]
        elif self.indexed:
            self.fields = ["order", "start"]
        else:
            self.fields = ["start"] if problem.packed and not problem.shared else []

    @property
    def count(self) -> int:
        """Groups, the one that reads no prefix included."""
        return self.problem.A + self.indexed

    def __call__(self, x: Tensors) -> None:
        if self.by_position:
            self.group_by_position(x)
        elif self.indexed:
            group, x["order"] = sorted_as_int32(self.prefix_of_token(x))
            x["start"] = torch.searchsorted(group, torch.arange(self.problem.A + 2, device=group.device)).to(
                torch.int32
            )
        elif self.fields:
            x["start"] = x["cu_seqlens_q"]

    def prefix_of_token(self, x: Tensors) -> Tensor:
        """[tokens] the prefix that a flat token reads; A where it reads none."""
        p, device = self.problem, x["q"].device
        if p.shared:
            return torch.zeros(p.tokens, device=device, dtype=torch.int64)
        index = x["prefix_index"]
        if index is None:
            index = torch.arange(p.B, device=device)
        index = torch.where((index >= 0) & (index < p.A), index, p.A).long()
        return index[row_of_token(x["cu_seqlens_q"], p.tokens)] if p.packed else index.repeat_interleave(p.T)

    def group_by_position(self, x: Tensors) -> None:
        """Under a window over the prefix, what sees a slot is then a run of its group."""
        p, device, lengths = self.problem, x["q"].device, x["prefix_lengths"]
        assert p.reach is not None
        place, x["order"] = sorted_as_int32(self.prefix_of_token(x) * FAR + x["position"])
        start = torch.searchsorted(place, torch.arange(p.A + 2, device=device) * FAR - FAR // 2)
        length = p.P if lengths is None else lengths.clamp(0, p.P).long()[:, None]
        first_hidden = torch.arange(p.P, device=device) - length + p.reach  # position that no longer sees a slot
        a = torch.arange(p.A, device=device)[:, None]
        seen = torch.searchsorted(place, a * FAR + first_hidden) - start[: p.A, None]
        x["start"], x["seen"] = start.to(torch.int32), seen.to(torch.int32)


def sorted_as_int32(places: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted, the order that sorts them)."""
    place, order = torch.sort(places, stable=True)
    return place, order.to(torch.int32)
