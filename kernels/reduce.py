"""The second pass of a split reduction: out = Σ_part x[part], part after part, so the sum is the same in every run.

Axes: x [parts, ...] fp32 and contiguous, out [...].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.launch import launch, target_of
from softkv.kernels.tiles import tile


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(x_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(x_ptr + i, mask=i < size, other=0.0)
        x_ptr += size
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


def add_parts(x: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum over the first axis, in the dtype of `like`."""
    if x is None or x.shape[0] == 1:
        return None if x is None else x[0]
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    block = tile("add_parts", target_of(x), like.shape[-1], x.dtype)
    launch(
        add_parts_kernel, triton.cdiv(out.numel(), block.own), block,
        x_ptr=x, out_ptr=out, parts=x.shape[0], size=out.numel(), BLOCK=block.own,
    )  # fmt: skip
    return out
