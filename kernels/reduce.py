"""The second pass of a split reduction: out = Σ_part x[part], one part after another, so the sum is the same in every
run.

Keys and values of a prefix in one launch: the first `k_programs` programs add up dprefix_k, the others dprefix_v.
"""

import math

import triton
import triton.language as tl

from softkv.kernels.launch import Launch, Memory
from softkv.kernels.problem import SLOTS, Problem, contiguous


@triton.jit
def add_up(block, x_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(x_ptr + i, mask=i < size, other=0.0)
        x_ptr += size
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["parts", "k_programs"])
def add_parts_kernel(ptr, parts, k_programs, k_size, v_size, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if ptr.part_k is not None:  # noqa: SIM102 (decided when compiling; the next, by each program)
        if program < k_programs:
            add_up(program, ptr.part_k, ptr.dprefix_k, parts, k_size, BLOCK)
    if ptr.part_v is not None:  # noqa: SIM102
        if program >= k_programs:
            add_up(program - k_programs, ptr.part_v, ptr.dprefix_v, parts, v_size, BLOCK)


def plan_add_parts(p: Problem, memory: dict[str, Memory]) -> list[Launch]:
    """Plan nothing if there are no parts. The sums are contiguous, which is recorded in `memory`."""
    made = [name for name in SLOTS if name.replace("prefix", "part") in memory]
    if not made:
        return []
    tile, parts, size = p.tile("add_parts"), 1, dict.fromkeys(SLOTS, 0)
    pointers: dict[str, str] = {}
    for name in made:
        part = name.replace("prefix", "part")
        parts, *shape = memory[part].shape
        memory[f"d{name}"] = contiguous(tuple(shape), p.dtype)
        pointers |= {part: part, f"d{name}": f"d{name}"}
        size[name] = math.prod(shape)
    k_programs, v_programs = (triton.cdiv(size[name], tile.own) for name in SLOTS)
    return [
        Launch(
            add_parts_kernel, k_programs + v_programs, tile, pointers, parts=parts, k_programs=k_programs,
            k_size=size["prefix_k"], v_size=size["prefix_v"], BLOCK=tile.own,
        )
    ]  # fmt: skip
