"""The two operators behind the public functions, `softkv::attention` and its backward, and the engines they run.

An engine is a module with two functions, and trusts what it is given:

    forward(q, k, v, prefix_k, prefix_v, *, prefix_index, prefix_lengths, key_mask, key_lengths, cu_seqlens_q,
            cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, scale, is_causal, window, window_covers_prefix, softcap)
        -> (out, lse)
    backward(grad_out, grad_lse, out, lse, q, k, v, prefix_k, prefix_v, *, <the same keywords>, needs)
        -> (dq, dk, dv, dprefix_k, dprefix_v, dsinks)

Dense: q [B, H, T, D], k and v [B, G, S, D], no cu_seqlens, lse [B, H, T]. Packed: q [N, H, D], k and v [M, G, D],
int32 cu_seqlens [rows + 1], lse [H, N]. There is at least one query. The prefix is None or [A, G, P, D] with P ≥ 1;
without an index A is 1 (shared) or the number of rows. grad_lse may be None. `needs` says which gradients to compute;
the others are None.
"""

import importlib
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv import ranges

ENGINES = {"torch": "softkv.ops.torch", "triton": "softkv.kernels", "flash": "softkv.ops.flash"}
_loaded: dict[str, ModuleType] = {}


def load_engine(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = importlib.import_module(ENGINES[name])
    return _loaded[name]


def rows_of_memory(x: Tensor) -> Tensor:
    """Engines read head vectors as runs of memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


_library = torch.library.Library("softkv", "DEF")
_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_index, Tensor? prefix_lengths, "
    "Tensor? key_mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor? sinks, float scale, bool is_causal, int? window, bool window_covers_prefix, "
    "float? softcap, str engine"
)
_library.define(f"attention({_OPERANDS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_OPERANDS}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attention(
    q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, key_mask, key_lengths, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, sinks, scale, is_causal, window, window_covers_prefix, softcap, engine,
):  # fmt: skip
    if q.numel() == 0:
        return _attention_fake(q, k, v)
    if prefix_k is not None and prefix_k.numel() == 0:
        prefix_k = prefix_v = prefix_index = prefix_lengths = None
    return load_engine(engine).forward(
        q, k, v, prefix_k, prefix_v, prefix_index=prefix_index, prefix_lengths=prefix_lengths, key_mask=key_mask,
        key_lengths=key_lengths, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, sinks=sinks, scale=scale, is_causal=is_causal, window=window,
        window_covers_prefix=window_covers_prefix, softcap=softcap,
    )  # fmt: skip


def _attention_fake(q, k, v, *rest):
    wide = torch.promote_types(q.dtype, torch.float32)
    lse_shape = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return torch.empty_like(q), q.new_empty(lse_shape, dtype=wide)


def _attention_backward(
    grad_out, grad_lse, out, lse, q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, key_mask, key_lengths,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, scale, is_causal, window, window_covers_prefix,
    softcap, engine, needs,
):  # fmt: skip
    leaves = (q, k, v, prefix_k, prefix_v, sinks)
    if q.numel() == 0:
        return tuple(torch.zeros_like(x) if n else q.new_empty(0) for x, n in zip(leaves, needs, strict=True))
    no_prefix = prefix_k is not None and prefix_k.numel() == 0
    if no_prefix:
        prefix_k = prefix_v = prefix_index = prefix_lengths = None
    grads = load_engine(engine).backward(
        grad_out, grad_lse, out, lse, q, k, v, prefix_k, prefix_v, prefix_index=prefix_index,
        prefix_lengths=prefix_lengths, key_mask=key_mask, key_lengths=key_lengths, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, sinks=sinks, scale=scale,
        is_causal=is_causal, window=window, window_covers_prefix=window_covers_prefix, softcap=softcap,
        needs=[n and not (no_prefix and i in (3, 4)) for i, n in enumerate(needs)],
    )  # fmt: skip
    return tuple(_like(x, g) if n else q.new_empty(0) for x, g, n in zip(leaves, grads, needs, strict=True))


def _like(leaf: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient laid out as its fake says; zero where the engine read nothing."""
    if grad is None:
        return torch.zeros_like(leaf)
    if grad.stride() == leaf.stride():
        return grad
    out = torch.empty_like(leaf)
    return grad if grad.stride() == out.stride() else out.copy_(grad)


def _attention_backward_fake(grad_out, grad_lse, out, lse, q, k, v, prefix_k, prefix_v, *rest):
    sinks, needs = rest[8], rest[-1]
    leaves = (q, k, v, prefix_k, prefix_v, sinks)
    return tuple(torch.empty_like(x) if n else q.new_empty(0) for x, n in zip(leaves, needs, strict=True))


def _save(ctx, inputs, output):
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)
    ctx.range = ranges.current()


def _derive(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    inputs = [x if t is None else t for t, x in zip(tensors, ctx.inputs, strict=True)]
    wanted = ctx.needs_input_grad
    needs = [*wanted[:5], wanted[13]]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    with ranges.backward_of(ctx.range):
        grads = _attention_backward_op(rows_of_memory(grad_out), grad_lse, out, lse, *inputs, needs)
    dq, dk, dv, dprefix_k, dprefix_v, dsinks = (g if n else None for g, n in zip(grads, needs, strict=True))
    return dq, dk, dv, dprefix_k, dprefix_v, *[None] * 8, dsinks, *[None] * 6


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError("prefix_attention: double backward is not supported; backend='reference' is")


for _name, _kernel, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softkv::{_name}", _fake, lib=_library)
torch.library.register_autograd("softkv::attention", _derive, setup_context=_save, lib=_library)
torch.library.register_autograd("softkv::attention_backward", _refuse_double_backward, lib=_library)

_attention_op = cast(Any, torch.ops.softkv.attention.default)
_attention_backward_op = cast(Any, torch.ops.softkv.attention_backward.default)


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`softkv::attention`. Where the dispatcher has nothing to add (no gradient, no tracing, plain tensors), the engine
    is called at once: for one token of a few rows the way through it would take as long as the attention."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    if tracing or not all(_plain(x) for x in arguments if isinstance(x, Tensor)):
        return _attention_op(*arguments)
    return _attention(*arguments)


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and not x.is_meta and not (x.requires_grad and torch.is_grad_enabled())
