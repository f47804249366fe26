"""The public attention op: the front door, which checks once. Behind it stand the operators and engines of
`softkv.ops.operator`.
"""

import itertools
import math
import warnings
from collections.abc import Collection

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from softkv.ops.operator import ENGINES, attention, load_engine, rows_of_memory
from softkv.ops.reference import reference_attention, reference_attention_varlen

_BACKENDS = (*ENGINES, "reference")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


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
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row's queries to a soft-prompt prefix and to the row's own tokens, never concatenated.

    Axes: B batch rows, H query heads, G key/value heads (H a multiple of G), T query tokens, S key tokens, P prefix
    slots, A prefixes, D head dim.

    Args:
        q: queries [B, H, T, D]; float16, bfloat16, float32 or float64, any strides.
        k, v: keys and values of the tokens [B, G, S, D], of q's dtype and device.
        prefix_k, prefix_v: soft keys and values [A, G, P, D], of q's dtype and device. Every query sees every slot of
            its row's prefix. A = 1: one prefix shared by all rows. A = B: one for each row. Any A with `prefix_index`.
        prefix_index: [B] int32 or int64, the number of each row's prefix in a bank; −1: the row has none.
        prefix_lengths: [A] int32 or int64, slots in use of each prefix (0..P); those past it do not exist.
        scale: factor on the scores; 1/√D by default.
        is_causal: query t of T stands at key position n − T + t, n the row's number of keys, and sees no key after it.
        key_mask: [B, S] bool; False keys are not seen but keep their positions.
        key_lengths: [B] int32 or int64, each row's n (0..S); keys from n on do not exist. S by default.
        window: a query sees the last `window` key positions, its own included; needs `is_causal`. Counts tokens only.
        window_covers_prefix: the window counts prefix slots too, as the positions just before the row's first seen key.
        softcap: c > 0 turns a scaled score s into c·tanh(s/c).
        sinks: [H] floating, one more logit of each head in the denominator, neither scaled nor capped.
        return_lse: also return the log-sum-exp.
        backend: None chooses by device (CPU: "torch", CUDA and ROCm: "triton"); "torch" | "triton" | "flash" |
            "reference" is an order: what that backend cannot serve is an error.

    Returns:
        out [B, H, T, D], of q's dtype and layout in memory (but for a head dim that is not last there). With
        `return_lse` also lse [B, H, T], the natural logarithm of the denominator, sinks included, float32 (float64 for
        float64 inputs), differentiable. A query that sees nothing has out 0 and lse −inf (with sinks, its head's sink).

    What no query sees (masked keys, keys and slots past a length) may hold anything, NaN too.

    Gradients flow to q, k, v, prefix_k, prefix_v and sinks, and only those asked for are computed. A prefix's gradient
    is summed over the rows and query heads that read it, in at least float32 and in a fixed order: bitwise the same
    every run.

    Raises:
        ValueError: a shape, head count, device or option that does not fit; on CPU in eager mode also a prefix index or
            a length out of range (on other devices values are not read: an index out of range reads no prefix).
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that cannot serve the call; double backward; `torch.func` transforms; forward-mode AD.
            The first fails in the backward pass, the others here. `backend="reference"` does all three.

    Source: exact attention in parts merged by log-sum-exp, as in FlashDecoding and Hydragen (arXiv 2402.05099), with
    the backward of FlashAttention-2 (arXiv 2307.08691) run on each part with the merged log-sum-exp.
    """
    _check_operands(
        {"q": q, "k": k, "v": v},
        {"prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_index": prefix_index, "prefix_lengths": prefix_lengths,
         "key_mask": key_mask, "key_lengths": key_lengths, "sinks": sinks},
        backend,
    )  # fmt: skip
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dims [B, H, T, D], got {_shape(q)}")
    B, H, T, D = q.shape
    _check_tokens(q, k, v, H, D, "[B, G, S, D]")
    S = k.shape[2]
    if k.shape[0] != B:
        raise ValueError(f"k: expected the batch of q, {B} rows, got {k.shape[0]}")
    _check_options(scale, window, is_causal, softcap)
    if key_mask is not None or key_lengths is not None:
        _check_keys(q, key_mask, key_lengths, B, S)
    if prefix_k is not None or prefix_v is not None or prefix_index is not None or prefix_lengths is not None:
        prefix_k, prefix_v = _check_prefix(q, prefix_k, prefix_v, prefix_index, prefix_lengths, B, k.shape[1])
    if sinks is not None:
        _check_sinks(q, sinks, H)

    if backend == "reference":
        out, lse = reference_attention(
            q, k, v, prefix_k, prefix_v, prefix_index=prefix_index, prefix_lengths=prefix_lengths, scale=scale,
            is_causal=is_causal, key_mask=key_mask, key_lengths=key_lengths, window=window,
            window_covers_prefix=window_covers_prefix, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    engine = _engine(backend, q)
    out, lse = attention(
        rows_of_memory(q), rows_of_memory(k), rows_of_memory(v), prefix_k, prefix_v, prefix_index, prefix_lengths,
        key_mask, key_lengths, None, None, T, S, sinks, D**-0.5 if scale is None else scale, is_causal, window,
        window_covers_prefix, softcap, engine,
    )  # fmt: skip
    return (out, lse) if return_lse else out


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
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefix_attention` on packed rows: all rows of a batch end to end in one line, without padding.

    Axes: N packed query tokens, M packed key tokens, B rows; the others as in `prefix_attention`.

    Args:
        q: queries [N, H, D]; float16, bfloat16, float32 or float64, any strides.
        k, v: keys and values of the tokens [M, G, D], of q's dtype and device.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 on q's device: 0 and the rows' running totals, so that row b's queries
            are q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]; the last are N and M. Rows of length 0 are allowed.
        max_seqlen_q, max_seqlen_k: at least the length of the longest row.
        prefix_k, prefix_v: [A, G, P, D]; A = 1 shared, A = B one for each row, any A with `prefix_index` [B].
        return_lse, backend and the remaining keywords: as in `prefix_attention`.

    Returns:
        out [N, H, D], of q's dtype and layout; with `return_lse` also lse [H, N].

    Raises:
        As `prefix_attention`; on CPU in eager mode also ValueError for cu_seqlens that do not start at 0, decrease, end
        elsewhere than at the number of tokens, or hold a row longer than max_seqlen.

    Source: the packed layout is flash-attn's `flash_attn_varlen_func`.
    """
    _check_operands(
        {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        {"prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_index": prefix_index, "prefix_lengths": prefix_lengths,
         "sinks": sinks},
        backend,
    )  # fmt: skip
    if q.dim() != 3:
        raise ValueError(f"q: expected 3 dims [N, H, D], got {_shape(q)}")
    H, D = q.shape[1], q.shape[2]
    _check_tokens(q, k, v, H, D, "[M, G, D]")
    _check_options(scale, window, is_causal, softcap)
    rows = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q.dim() == 1 else -1
    _check_cu_seqlens(q, "cu_seqlens_q", cu_seqlens_q, rows, q.shape[0], max_seqlen_q)
    _check_cu_seqlens(q, "cu_seqlens_k", cu_seqlens_k, rows, k.shape[0], max_seqlen_k)
    if prefix_k is not None or prefix_v is not None or prefix_index is not None or prefix_lengths is not None:
        prefix_k, prefix_v = _check_prefix(q, prefix_k, prefix_v, prefix_index, prefix_lengths, rows, k.shape[1])
    if sinks is not None:
        _check_sinks(q, sinks, H)

    if backend == "reference":
        out, lse = reference_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, prefix_k, prefix_v, prefix_index=prefix_index,
            prefix_lengths=prefix_lengths, scale=scale, is_causal=is_causal, window=window,
            window_covers_prefix=window_covers_prefix, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    engine = _engine(backend, q)
    out, lse = attention(
        rows_of_memory(q), rows_of_memory(k), rows_of_memory(v), prefix_k, prefix_v, prefix_index, prefix_lengths,
        None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, D**-0.5 if scale is None else scale,
        is_causal, window, window_covers_prefix, softcap, engine,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_operands(needed: dict[str, Tensor], optional: dict[str, Tensor | None], backend: str | None) -> None:
    given = needed | {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if backend != "reference":
        _refuse_transforms(given.values())


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, H: int, D: int, layout: str) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != q.dim() or x.shape[-1] != D:
            raise ValueError(f"{name}: expected {layout} with D = {D}, got {_shape(x)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {_shape(k)}, got {_shape(v)}")
    if D == 0 or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(f"heads: expected D ≥ 1 and H a multiple of G ≥ 1, got H = {H}, G = {k.shape[1]}, D = {D}")


def _check_options(scale: float | None, window: int | None, is_causal: bool, softcap: float | None) -> None:
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, or None for D^-0.5, got {scale}")
    if window is not None:
        _check_integer("window", window)
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(f"window: expected at least 1, with is_causal=True, got {window} with is_causal={is_causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number above 0, or None, got {softcap}")


def _check_integer(name: str, x: int) -> None:
    if not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {x!r}")


def _check_integers(q: Tensor, name: str, x: Tensor, size: int, dtypes: tuple[torch.dtype, ...] = _INTEGERS) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{name}: expected [{size}], got {_shape(x)}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def _readable(x: Tensor) -> bool:
    """Values are checked where reading them is free: not on a GPU (a host sync), not while tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, x: Tensor, low: int, high: int) -> None:
    if _readable(x) and (bad := [i for i in x.tolist() if not low <= i <= high]):
        raise ValueError(f"{name}: expected values from {low} to {high}, got {bad[0]}")


def _check_keys(q: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None, B: int, S: int) -> None:
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: expected torch.bool, got {key_mask.dtype}")
        if tuple(key_mask.shape) != (B, S):
            raise ValueError(f"key_mask: expected [B, S] = [{B}, {S}], got {_shape(key_mask)}")
        if key_mask.device != q.device:
            raise ValueError(f"key_mask: expected the device of q, {q.device}, got {key_mask.device}")
    if key_lengths is not None:
        _check_integers(q, "key_lengths", key_lengths, B)
        _check_range("key_lengths", key_lengths, 0, S)


def _check_prefix(
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    rows: int,
    G: int,
) -> tuple[Tensor, Tensor]:
    if prefix_k is None or prefix_v is None:
        given = [n for n, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v), ("prefix_index", prefix_index),
                                ("prefix_lengths", prefix_lengths)) if x is not None]  # fmt: skip
        raise ValueError(f"prefix: expected prefix_k and prefix_v together, got only {', '.join(given)}")
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.dim() != 4 or x.shape[1] != G or x.shape[3] != q.shape[-1]:
            raise ValueError(f"{name}: expected [A, G, P, D] with G = {G}, D = {q.shape[-1]}, got {_shape(x)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if prefix_k.shape != prefix_v.shape:
        raise ValueError(f"prefix_v: expected the shape of prefix_k, {_shape(prefix_k)}, got {_shape(prefix_v)}")
    A = prefix_k.shape[0]
    if prefix_index is not None:
        _check_integers(q, "prefix_index", prefix_index, rows)
        _check_range("prefix_index", prefix_index, -1, A - 1)
    elif A != 1 and rows != A:
        raise ValueError(f"prefix_k: expected A = 1 or one prefix a row, {rows}, without prefix_index, got A = {A}")
    if prefix_lengths is not None:
        _check_integers(q, "prefix_lengths", prefix_lengths, A)
        _check_range("prefix_lengths", prefix_lengths, 0, prefix_k.shape[2])
    return rows_of_memory(prefix_k), rows_of_memory(prefix_v)


def _check_sinks(q: Tensor, sinks: Tensor, H: int) -> None:
    if not sinks.dtype.is_floating_point:
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if tuple(sinks.shape) != (H,):
        raise ValueError(f"sinks: expected [H] = [{H}], got {_shape(sinks)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected the device of q, {q.device}, got {sinks.device}")


def _check_cu_seqlens(q: Tensor, name: str, x: Tensor, rows: int, total: int, longest: int) -> None:
    if rows < 0:
        raise ValueError(f"{name}: expected [B + 1], got {_shape(x)}")
    _check_integers(q, name, x, rows + 1, (torch.int32,))
    _check_integer(name.replace("cu_seqlens", "max_seqlen"), longest)
    if _readable(x):
        ends = x.tolist()
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"{name}: expected it to start at 0 and end at {total}, got {ends[0]} and {ends[-1]}")
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        if lengths and not 0 <= min(lengths) <= max(lengths) <= longest:
            raise ValueError(f"{name}: expected row lengths from 0 to max_seqlen = {longest}, got {lengths}")


def _refuse_transforms(tensors: Collection[Tensor]) -> None:
    if torch.compiler.is_compiling():
        return
    if functorch.maybe_current_level() is not None and any(functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise RuntimeError("prefix_attention: torch.func transforms are not supported; backend='reference' is")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("prefix_attention: forward-mode AD is not supported; backend='reference' is")


def _engine(backend: str | None, q: Tensor) -> str:
    if backend is None:
        return "triton" if q.is_cuda else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "triton" and not q.is_cuda and not load_engine("triton").interpreter_enabled():
        raise RuntimeError(f"backend 'triton': expected a CUDA or ROCm tensor, or TRITON_INTERPRET=1, got {q.device}")
    if backend == "triton" and not q.is_cuda and q.dtype == torch.bfloat16:
        warnings.warn("Triton's interpreter computes bfloat16 wrongly: expected float16 or float32 there", stacklevel=3)
    return backend
