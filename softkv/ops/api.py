"""The public attention op: two functions, dense and packed, that validate their arguments and run an engine."""

import warnings

import torch
from torch import Tensor

from softkv.ops import checks, choice, reference
from softkv.ops.engine import Call
from softkv.ops.operator import ENGINES, attention, load_engine, rows_of_memory

_BACKENDS = (*ENGINES, "reference")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    chunk: int | None = None,
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row's queries to a soft-prompt prefix and to the row's own tokens, without concatenating them.

    Axes: B batch rows, H query heads, G key/value heads (H a multiple of G), T query tokens, S key tokens, P prefix
    slots, A prefixes, D head dim of queries and keys, Dv of values.

    Args:
        q: queries [B, H, T, D]; float16, bfloat16, float32 or float64, any strides.
        k, v: keys [B, G, S, D] and values [B, G, S, Dv] of the tokens, of q's dtype and device.
        prefix_k, prefix_v: soft keys [A, G, P, D] and values [A, G, P, Dv], of q's dtype and device. Every query sees
            every slot of its row's prefix. A = 1: one prefix shared by all rows. A = B: one for each row. Any A with
            `prefix_index`.
        prefix_index: [B] int32 or int64, the index of each row's prefix in the bank; −1: the row has no prefix.
        prefix_lengths: [A] int32 or int64, the number of slots in use of each prefix (0..P); slots past it do not
            exist.
        scale: factor on the scores; 1/√D by default.
        is_causal: query t of T has key position n − T + t, where n is the row's number of keys, and sees no later key.
        key_mask: [B, S] bool; keys at False are not seen but keep their positions.
        key_lengths: [B] int32 or int64, each row's n (0..S); keys from n on do not exist. S by default.
        chunk: a query at key position i sees only keys from position ⌊i / chunk⌋·chunk on, of its own chunk, and the
            prefix; needs `is_causal`, not together with `window`.
        window: a query sees the last `window` key positions, its own included; needs `is_causal`. Counts tokens only.
        window_covers_prefix: the window counts prefix slots too, as the positions just before the row's first seen key;
            chunks are counted from slot 0 then, and a query sees the slots of its own chunk.
        softcap: c > 0 turns a scaled score s into c·tanh(s/c).
        sinks: [H], of any of q's dtypes, one more logit of each head in the denominator, neither scaled nor capped.
        return_lse: also return the log-sum-exp.
        backend: None chooses by device (CPU: "torch"; CUDA and ROCm: "triton", or an engine that was measured to be
            faster, see `softkv.ops.choice`); "torch" | "triton" | "cudnn" | "flash" | "reference" forces that backend;
            unsupported calls raise.

    Returns:
        out [B, H, T, Dv], of q's dtype and, for Dv = D, memory layout (except that its head dim is always contiguous).
        With `return_lse` also lse [B, H, T], the natural logarithm of the denominator, sinks included, float32 (float64
        for float64 inputs), differentiable. A query that sees nothing has out 0 and lse −inf (with sinks, its head's
        sink).

    Keys and slots that no query sees (masked, or past a length) may contain any values, including NaN.

    Gradients flow to q, k, v, prefix_k, prefix_v and sinks; only the required ones are computed. A prefix's gradient is
    summed over the rows and query heads that read it, in at least float32 and in a fixed order, so it is bitwise
    deterministic.

    Raises:
        ValueError: for an invalid shape, head count, device or option; on CPU in eager mode also for a prefix index or
            length out of range (on other devices values are not read, and an index out of range reads no prefix).
        TypeError: for an invalid dtype.
        RuntimeError: for a backend that does not support the call, double backward (raised in the backward pass),
            `torch.func` transforms, and forward-mode AD. `backend="reference"` supports the last three.

    References: exact attention over parts merged by log-sum-exp, as in FlashDecoding and Hydragen (arXiv 2402.05099),
    with the backward of FlashAttention-2 (arXiv 2307.08691) run on each part with the merged log-sum-exp.

    Example:
        >>> q = torch.randn(2, 4, 5, 8)  # [B, H, T, D]
        >>> k, v = torch.randn(2, 2, 2, 5, 8).unbind()  # [B, G, T, D]
        >>> prefix_k, prefix_v = torch.randn(2, 1, 2, 3, 8).unbind()  # [A, G, P, D]: one prefix for all rows
        >>> out, lse = softkv.prefix_attention(q, k, v, prefix_k, prefix_v, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 5]))
    """
    checks.check_queries(q, "[B, H, T, D]")
    call = Call(
        q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, prefix_index=prefix_index, prefix_lengths=prefix_lengths,
        key_mask=key_mask, key_lengths=key_lengths, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, sinks=sinks, scale=checks.checked_scale(scale, q.shape[-1]), is_causal=is_causal,
        window=checks.checked_reach("window", window), window_covers_prefix=window_covers_prefix,
        chunk=checks.checked_reach("chunk", chunk), softcap=checks.checked_softcap(softcap),
    )  # fmt: skip
    checks.check_dense(call)
    return _attend(call, backend, return_lse)


def prefix_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    chunk: int | None = None,
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefix_attention` on packed rows: the rows of a batch concatenated without padding.

    Axes: N packed query tokens, M packed key tokens, B rows; the others as in `prefix_attention`.

    Args:
        q: queries [N, H, D]; float16, bfloat16, float32 or float64, any strides.
        k, v: keys [M, G, D] and values [M, G, Dv] of the tokens, of q's dtype and device.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 on q's device: cumulative row lengths starting at 0, so that row b's
            queries are q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]; the last values are N and M. Rows of length 0 are
            allowed.
        max_seqlen_q, max_seqlen_k: at least the length of the longest row.
        prefix_k, prefix_v: [A, G, P, D] and [A, G, P, Dv]; A = 1: shared, A = B: one per row, any A with `prefix_index`
            [B].
        return_lse, backend and the remaining keywords: as in `prefix_attention`.

    Returns:
        out [N, H, Dv], of q's dtype; with `return_lse` also lse [H, N].

    Raises:
        As `prefix_attention`; on CPU in eager mode also ValueError for cu_seqlens that do not start at 0, decrease, do
        not end at the number of tokens, or contain a row longer than max_seqlen.

    Reference: the packed layout is that of flash-attn's `flash_attn_varlen_func`.

    Example:
        >>> q = torch.randn(5, 4, 8)  # two rows, of 2 and 3 tokens
        >>> k, v = torch.randn(2, 5, 2, 8).unbind()
        >>> prefix_k, prefix_v = torch.randn(2, 1, 2, 3, 8).unbind()
        >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> softkv.prefix_attention_varlen(q, k, v, ends, ends, 3, 3, prefix_k, prefix_v).shape
        torch.Size([5, 4, 8])
    """
    checks.check_queries(q, "[N, H, D]")
    call = Call(
        q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, prefix_index=prefix_index, prefix_lengths=prefix_lengths,
        key_mask=None, key_lengths=None, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, sinks=sinks,
        scale=checks.checked_scale(scale, q.shape[-1]), is_causal=is_causal,
        window=checks.checked_reach("window", window), window_covers_prefix=window_covers_prefix,
        chunk=checks.checked_reach("chunk", chunk), softcap=checks.checked_softcap(softcap),
    )  # fmt: skip
    checks.check_packed(call)
    return _attend(call, backend, return_lse)


def _attend(call: Call, backend: str | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    checks.check_flag("return_lse", return_lse)
    if backend == "reference":
        out, lse = reference.forward(**call)
    else:
        checks.refuse_transforms(call)
        engine = engine_for(backend, call)
        for name in ("q", "k", "v", "prefix_k", "prefix_v"):
            x = call[name]
            if x is not None:
                call[name] = rows_of_memory(x)
        out, lse = attention(call, engine, out_alone=not return_lse)  # type: ignore[assignment]
    return (out, lse) if return_lse else out


def engine_for(backend: str | None, call: Call) -> str:
    """The engine of the given backend, or the default one for the call."""
    q = call["q"]
    if backend is None:
        return choice.engine_for(call) if q.is_cuda else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(_BACKENDS)}, got {backend!r:.300}")
    if backend == "triton" and not q.is_cuda and not load_engine("triton").interpreter_enabled():
        raise RuntimeError(f"backend 'triton': expected a CUDA or ROCm tensor, or TRITON_INTERPRET=1, got {q.device}")
    if backend == "triton" and not q.is_cuda and q.dtype == torch.bfloat16:
        warnings.warn("Triton's interpreter computes bfloat16 incorrectly: use float16 or float32", stacklevel=3)
    return backend
