"""The tokens that read each prefix, grouped on the device: fixed shapes, a stable sort, no synchronisation.

Group a is `order[start[a] : start[a + 1]]`, flat tokens. Without `order` the tokens are already in the order of their
groups; if `start` is missing too, all tokens read the same prefix (SHARED), or group a is the T tokens of row a. Rows
that read no prefix form a last group with index A.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.launch import Tensors
from softkv.kernels.problem import Problem, row_of_token

FAR = 2**32  # distance between groups in the sort keys


@triton.jit
def group_extent(a, exists, ptr, T, count, SHARED: tl.constexpr):
    """(first token, number of tokens) of the groups `a`; those that don't exist are empty."""
    if ptr.start is not None:
        first = tl.load(ptr.start + a, mask=exists, other=0)
        return first, tl.load(ptr.start + a + 1, mask=exists, other=0) - first
    elif SHARED:
        return a * 0, tl.where(exists, count, 0)
    else:
        return a * T, tl.where(exists, T, 0)


class Readers:
    """A step that groups a call's tokens and writes those of `order`, `start`, `seen` that are in `fields`."""

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
        """The number of groups, including the one that reads no prefix."""
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
        """[tokens] the prefix that each flat token reads; A if it reads none."""
        p, device = self.problem, x["q"].device
        if p.shared:
            return torch.zeros(p.tokens, device=device, dtype=torch.int64)
        index = x["prefix_index"]
        if index is None:
            index = torch.arange(p.B, device=device)
        index = torch.where((index >= 0) & (index < p.A), index, p.A).long()
        return index[row_of_token(x["cu_seqlens_q"], p.tokens)] if p.packed else index.repeat_interleave(p.T)

    def group_by_position(self, x: Tensors) -> None:
        """Sort a group by position, so that with a window over the prefix the readers of a slot are contiguous."""
        p, device, lengths = self.problem, x["q"].device, x["prefix_lengths"]
        assert p.reach is not None
        place, x["order"] = sorted_as_int32(self.prefix_of_token(x) * FAR + x["position"])
        start = torch.searchsorted(place, torch.arange(p.A + 2, device=device) * FAR - FAR // 2)
        length = p.P if lengths is None else lengths.clamp(0, p.P).long()[:, None]
        first_hidden = torch.arange(p.P, device=device) - length + p.reach  # first position that can't see a slot
        a = torch.arange(p.A, device=device)[:, None]
        seen = torch.searchsorted(place, a * FAR + first_hidden) - start[: p.A, None]
        x["start"], x["seen"] = start.to(torch.int32), seen.to(torch.int32)


def sorted_as_int32(places: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted values, sorting indices)."""
    place, order = torch.sort(places, stable=True)
    return place, order.to(torch.int32)
