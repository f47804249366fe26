"""Attention with Triton's warp specialisation: stands for a user's own kernel in the tests of the static profile."""

import triton
import triton.language as tl


@triton.jit
def attention(q, k, v, out, n, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    queries = tl.make_tensor_descriptor(q, [n, D], [D, 1], [BLOCK_M, D])
    keys = tl.make_tensor_descriptor(k, [n, D], [D, 1], [BLOCK_N, D])
    values = tl.make_tensor_descriptor(v, [n, D], [D, 1], [BLOCK_N, D])
    first = tl.program_id(0) * BLOCK_M
    q_tile = queries.load([first, 0])
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, n, BLOCK_N, warp_specialize=True):
        s = tl.dot(q_tile, keys.load([start, 0]).T) * scale
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        a = tl.exp2(m - m_new)
        l = l * a + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.bfloat16), values.load([start, 0]), acc * a[:, None])
        m = m_new
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(out + rows[:, None] * D + tl.arange(0, D)[None], (acc / l[:, None]).to(tl.bfloat16))
