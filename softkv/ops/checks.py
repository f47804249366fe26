"""Argument validation of the public functions. Errors give the expected and the actual value."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from softkv.ops.engine import Call

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_FARTHEST = 2**30  # positions are 32-bit in kernels; longer windows or chunks have no additional effect
_LARGEST = 1e30  # of a scale or softcap: float32 holds it and its reciprocal, with room for the scores
_PREFIX = ("prefix_k", "prefix_v", "prefix_index", "prefix_lengths")


def check_queries(q: Tensor, form: str) -> None:
    """`form` names the axes, such as "[B, H, T, D]"."""
    _check_tensor("q", q)
    if q.dim() != form.count(",") + 1:
        raise ValueError(f"q: expected {form.count(',') + 1} dims {form}, got {_shape(q)}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")


def check_dense(call: Call) -> None:
    q, k = call["q"], call["k"]
    _check_tokens(call, "[B, G, S, D]")
    B, S = q.shape[0], k.shape[2]
    if k.shape[0] != B:
        raise ValueError(f"k: expected the batch of q, {B} rows, got {k.shape[0]}")
    _check_options(call)
    key_mask, key_lengths = call["key_mask"], call["key_lengths"]
    if key_mask is not None:
        _check_tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: expected torch.bool, got {key_mask.dtype}")
        if key_mask.dim() != 2 or key_mask.shape[0] != B or key_mask.shape[1] != S:
            raise ValueError(f"key_mask: expected [B, S] = [{B}, {S}], got {_shape(key_mask)}")
        _check_device(q, "key_mask", key_mask)
    if key_lengths is not None:
        _check_integers(q, "key_lengths", key_lengths, B)
        _check_range("key_lengths", key_lengths, 0, S)
    _check_prefix(call, B)


def check_packed(call: Call) -> None:
    q, k = call["q"], call["k"]
    _check_tokens(call, "[M, G, D]")
    _check_options(call)
    rows = _check_cu_seqlens(q, "q", call["cu_seqlens_q"], None, q.shape[0], call["max_seqlen_q"])
    _check_cu_seqlens(q, "k", call["cu_seqlens_k"], rows, k.shape[0], call["max_seqlen_k"])
    _check_prefix(call, rows)


def checked_scale(x: float | None, D: int) -> float:
    if x is None:
        return D**-0.5 if D else 1.0
    if not _is_number(x):
        raise TypeError(f"scale: expected a number, or None for D^-0.5, got {_value(x)}")
    if not -_LARGEST <= x <= _LARGEST:
        raise ValueError(f"scale: expected a finite number up to {_LARGEST:g}, or None for D^-0.5, got {x}")
    return float(x)


def checked_softcap(x: float | None) -> float | None:
    if x is None:
        return None
    if not _is_number(x):
        raise TypeError(f"softcap: expected a number above 0, or None, got {_value(x)}")
    if not 1 / _LARGEST <= x <= _LARGEST:
        raise ValueError(f"softcap: expected a number above 0, from {1 / _LARGEST:g} to {_LARGEST:g}, or None, got {x}")
    return float(x)


def checked_reach(name: str, x: int | None) -> int | None:
    """A valid window or chunk, in positions."""
    if x is None:
        return None
    _check_integer(name, x)
    if x < 1:
        raise ValueError(f"{name}: expected at least 1, or None, got {x}")
    return min(x, _FARTHEST)


def check_flag(name: str, x: bool) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {_value(x)}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _value(x: object) -> str:
    """A short description of an unexpected value."""
    if isinstance(x, Tensor):
        return f"a tensor {_shape(x)}"
    text = repr(x)
    return text if len(text) <= 40 else f"{type(x).__name__} {text[:40]}…"


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | torch.SymInt | torch.SymFloat) and not isinstance(x, bool)


def _check_integer(name: str, x: Any) -> None:
    if not isinstance(x, int | torch.SymInt) or isinstance(x, bool):
        raise TypeError(f"{name}: expected an int, got {_value(x)}")


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense strided tensor, got {'a nested one' if x.is_nested else x.layout}")


def _check_device(q: Tensor, name: str, x: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def _check_like(q: Tensor, name: str, x: Tensor) -> None:
    if x.dtype is not q.dtype:
        raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
    _check_device(q, name, x)


def _check_tokens(call: Call, form: str) -> None:
    q, k, v, sinks = call["q"], call["k"], call["v"], call["sinks"]
    _check_tensor("k", k)
    _check_tensor("v", v)
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    H, D = of_q[1], of_q[-1]
    if len(of_k) != len(of_q) or of_k[-1] != D:
        raise ValueError(f"k: expected {form} with D = {D}, got {_shape(k)}")
    if of_v != of_k and (len(of_v) != len(of_k) or of_v[:-1] != of_k[:-1]):
        raise ValueError(f"v: expected the shape of k, {_shape(k)}, but for the last dim, got {_shape(v)}")
    _check_like(q, "k", k)
    _check_like(q, "v", v)
    G, Dv = of_k[1], of_v[-1]
    if D == 0 or Dv == 0 or G == 0 or H % G:
        raise ValueError(
            f"heads: expected D ≥ 1, Dv ≥ 1 and H a multiple of G ≥ 1, got H = {H}, G = {G}, D = {D}, Dv = {Dv}"
        )
    if sinks is not None:
        _check_tensor("sinks", sinks)
        if sinks.dtype not in _DTYPES:
            raise TypeError(f"sinks: expected float16, bfloat16, float32 or float64, got {sinks.dtype}")
        if sinks.dim() != 1 or sinks.shape[0] != H:
            raise ValueError(f"sinks: expected [H] = [{H}], got {_shape(sinks)}")
        _check_device(q, "sinks", sinks)


def _check_options(call: Call) -> None:
    is_causal, window, chunk = call["is_causal"], call["window"], call["chunk"]
    check_flag("is_causal", is_causal)
    check_flag("window_covers_prefix", call["window_covers_prefix"])
    if not is_causal and (window is not None or chunk is not None):
        name, reach = ("chunk", chunk) if window is None else ("window", window)
        raise ValueError(f"{name}: expected is_causal=True with it, got {reach} with is_causal=False")
    if window is not None and chunk is not None:
        raise ValueError(f"chunk: expected no window with it, got chunk={chunk} and window={window}")


def _check_integers(q: Tensor, name: str, x: Tensor, size: int, dtypes: tuple[torch.dtype, ...] = _INTEGERS) -> None:
    _check_tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{name}: expected [{size}], got {_shape(x)}")
    _check_device(q, name, x)


def _readable(x: Tensor) -> bool:
    """Values are checked only if reading them is free: not on a GPU (a synchronisation) and not while tracing."""
    if torch.compiler.is_compiling():
        return False
    return x.is_cpu and type(x) is Tensor and not functorch.is_functorch_wrapped_tensor(x)


def _check_range(name: str, x: Tensor, low: int, high: int) -> None:
    if _readable(x) and (bad := [i for i in x.tolist() if not low <= i <= high]):
        raise ValueError(f"{name}: expected values from {low} to {high}, got {bad[0]}")


def _check_prefix(call: Call, rows: int) -> None:
    q, prefix_k, prefix_v = call["q"], call["prefix_k"], call["prefix_v"]
    index, lengths = call["prefix_index"], call["prefix_lengths"]
    if prefix_k is None or prefix_v is None:
        given = [name for name in _PREFIX if call[name] is not None]  # type: ignore[literal-required]
        if given:
            raise ValueError(f"prefix: expected prefix_k and prefix_v together, got only {', '.join(given)}")
        return
    of_tokens, Dv = call["k"].shape, call["v"].shape[-1]
    G, D = of_tokens[1], of_tokens[-1]
    _check_tensor("prefix_k", prefix_k)
    _check_tensor("prefix_v", prefix_v)
    of_k, of_v = prefix_k.shape, prefix_v.shape
    if len(of_k) != 4 or of_k[1] != G or of_k[3] != D:
        raise ValueError(f"prefix_k: expected [A, G, P, D] with G = {G}, D = {D}, got {_shape(prefix_k)}")
    if len(of_v) != 4 or of_v[1] != G or of_v[3] != Dv:
        raise ValueError(f"prefix_v: expected [A, G, P, Dv] with G = {G}, Dv = {Dv}, got {_shape(prefix_v)}")
    _check_like(q, "prefix_k", prefix_k)
    _check_like(q, "prefix_v", prefix_v)
    A, P = of_k[0], of_k[2]
    if of_v[0] != A or of_v[2] != P:
        raise ValueError(f"prefix_v: expected the A = {A} and P = {P} of prefix_k, got {_shape(prefix_v)}")
    if index is not None:
        _check_integers(q, "prefix_index", index, rows)
        _check_range("prefix_index", index, -1, A - 1)
    elif A != 1 and rows != A:
        raise ValueError(f"prefix_k: expected A = 1 or one prefix a row, {rows}, without prefix_index, got A = {A}")
    if lengths is not None:
        _check_integers(q, "prefix_lengths", lengths, A)
        _check_range("prefix_lengths", lengths, 0, P)


def _check_cu_seqlens(q: Tensor, of: str, ends: Any, rows: int | None, total: int, longest: Any) -> int:
    """The number of rows."""
    name = f"cu_seqlens_{of}"
    _check_tensor(name, ends)
    if ends.dim() != 1 or ends.shape[0] == 0:
        raise ValueError(f"{name}: expected [B + 1], got {_shape(ends)}")
    rows = ends.shape[0] - 1 if rows is None else rows
    _check_integers(q, name, ends, rows + 1, (torch.int32,))
    _check_integer(f"max_seqlen_{of}", longest)
    if longest < 0:
        raise ValueError(f"max_seqlen_{of}: expected at least 0, got {longest}")
    if _readable(ends):
        values = ends.tolist()
        if values[0] != 0 or values[-1] != total:
            raise ValueError(f"{name}: expected it to start at 0 and end at {total}, got {values[0]} and {values[-1]}")
        bad = [b - a for a, b in itertools.pairwise(values) if not 0 <= b - a <= longest]
        if bad:
            raise ValueError(f"{name}: expected row lengths from 0 to max_seqlen = {longest}, got {bad[0]}")
    return rows


def transforms() -> bool:
    """Whether some transform of torch.func, or forward-mode AD, is under way."""
    return functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def refuse_transforms(call: Call) -> None:
    if torch.compiler.is_compiling():
        return
    if not transforms():
        return
    tensors = [x for x in call.values() if isinstance(x, Tensor)]
    if any(functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise RuntimeError("prefix_attention: torch.func transforms are not supported; backend='reference' is")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("prefix_attention: forward-mode AD is not supported; backend='reference' is")
