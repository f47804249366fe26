"""Kernels in styles of other authors, for `softkv profile static path.py:kernel`."""

import triton
import triton.language as tl


@triton.autotune([triton.Config({"BM": size}, num_warps=4) for size in (64, 128)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 64 == 0})
@triton.jit
def plain(x, y, out, n, BM: tl.constexpr, EVEN: tl.constexpr = True):
    i = tl.arange(0, BM)
    j = tl.arange(0, 64)
    total = tl.zeros((BM, BM), dtype=tl.float32)
    for start in range(0, n, 64):
        if EVEN:
            a = tl.load(x + i[:, None] * n + start + j[None, :])
            b = tl.load(y + i[:, None] * n + start + j[None, :])
        else:
            a = tl.load(x + i[:, None] * n + start + j[None, :], mask=start + j[None, :] < n, other=0.0)
            b = tl.load(y + i[:, None] * n + start + j[None, :], mask=start + j[None, :] < n, other=0.0)
        total += tl.dot(a, tl.trans(b))
    tl.store(out + i[:, None] * BM + i[None, :], total)


@triton.jit
def described(x, y, out, n, BM: tl.constexpr):
    i = tl.arange(0, BM)
    total = tl.zeros((BM, BM), dtype=tl.float32)
    for start in range(0, n, 64):
        total = tl.dot(x.load([0, start]), y.load([0, start]).T, total)
    tl.store(out + i[:, None] * BM + i[None, :], total)
