"""Runs a validated call on its engine, with gradients. There are two paths with the same results:

- `softkv::attention` and `softkv::attention_backward`, operators of `torch.library`, if something intercepts or traces:
  `torch.compile`, fake tensors, dispatch modes, tensor subclasses.
- An `autograd.Function`, or without gradients the engine itself, in plain eager mode, because dispatching a Python
  operator takes longer than the attention of one token.
"""

import importlib
import typing
from collections.abc import Sequence
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv import ranges
from softkv.ops.engine import NO_DOUBLE_BACKWARD, Call, Engine, Gradients, Needs, empty_out

ENGINES = {
    "torch": "softkv.ops.torch",
    "triton": "softkv.kernels",
    "cudnn": "softkv.ops.library.cudnn",
    "flash": "softkv.ops.library.flash",
}
_loaded: dict[str, Engine] = {}

_OPERANDS = tuple(Call.__annotations__)


def load_engine(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = cast(Engine, importlib.import_module(ENGINES[name]))
    return _loaded[name]


def attention(call: Call, engine: str, out_alone: bool = False) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a validated call; lse may be missing if only out is wanted."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    if traced or not all(_plain(x) for x in call.values() if isinstance(x, Tensor)):
        return _attention_op(*_operands(call), engine)
    if torch.is_grad_enabled():
        leaves = _leaves(call)
        if any(x is not None and x.requires_grad for x in leaves):
            shorter = getattr(load_engine(engine), "with_gradients", None) if out_alone else None
            out = None if shorter is None else shorter(call)
            if out is not None:
                return out, None
            return _Attention.apply(call, engine, *leaves)
    return _forward(call, engine)


def _plain(x: Tensor) -> bool:
    kind = type(x)
    return (kind is Tensor or kind is Parameter) and not x.is_meta and not x.is_neg()


def _forward(call: Call, engine: str) -> tuple[Tensor, Tensor]:
    if call["q"].numel() == 0:
        return _empty_results(call)
    return load_engine(engine).forward(**_without_empty_prefix(call))


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs, call: Call, engine: str
) -> Gradients:
    """The required gradients, 0 where the engine read nothing; None for the others."""
    grads: Sequence[Tensor | None] = [None] * len(needs)
    if call["q"].numel():
        call_read, needs_read = _without_empty_prefix(call), needs
        if call_read is not call:
            needs_read = needs._replace(prefix_k=False, prefix_v=False)
        if True in needs_read:
            grads = load_engine(engine).backward(grad_out, grad_lse, out, lse, needs=needs_read, **call_read)
    found = zip(_leaves(call), grads, needs, strict=True)
    return cast(Gradients, tuple((torch.zeros_like(x) if g is None else g) if n else None for x, g, n in found))


def _operands(call: Call) -> list[Any]:
    return [call[name] for name in _OPERANDS]  # type: ignore[literal-required]


def _leaves(call: Call) -> list[Any]:
    return [call[name] for name in Needs._fields]  # type: ignore[literal-required]


def _without_empty_prefix(call: Call) -> Call:
    """Drop a prefix without slots, which engines don't support."""
    prefix = call["prefix_k"]
    if prefix is None or prefix.numel():
        return call
    return {**call, "prefix_k": None, "prefix_v": None, "prefix_index": None, "prefix_lengths": None}


def _like(operand: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the layout that the fake operator declares."""
    if grad.stride() == operand.stride():
        return grad
    out = torch.empty_like(operand)
    return grad if grad.stride() == out.stride() else out.copy_(grad)


def _empty_results(call: Call) -> tuple[Tensor, Tensor]:
    q = call["q"]
    lse_shape = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return empty_out(q, call["v"]), q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))


def rows_of_memory(x: Tensor) -> Tensor:
    """Make head vectors contiguous, as engines need them."""
    return x if x.stride(-1) == 1 else x.contiguous()


# Saved between the passes, by both paths


def _save(ctx: Any, call: Call, engine: str, out: Tensor, lse: Tensor) -> None:
    tensors = {name: x for name, x in call.items() if isinstance(x, Tensor)}
    ctx.save_for_backward(*tensors.values(), out, lse)
    ctx.names = tuple(tensors)
    ctx.call = {**call, **dict.fromkeys(tensors)}
    ctx.engine = engine
    ctx.range = ranges.current()
    ctx.set_materialize_grads(False)


def _derive(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, needs: Needs, by_operator: bool) -> Gradients:
    *tensors, out, lse = ctx.saved_tensors
    call = cast(Call, {**ctx.call, **dict(zip(ctx.names, tensors, strict=True))})
    grad_out = torch.zeros_like(out) if grad_out is None else rows_of_memory(grad_out)
    with ranges.backward_of(ctx.range):
        if not by_operator:
            return _backward(grad_out, grad_lse, out, lse, needs, call, ctx.engine)
        grads = _attention_backward_op(grad_out, grad_lse, out, lse, *_operands(call), ctx.engine, list(needs))
        return cast(Gradients, tuple(g if n else None for g, n in zip(grads, needs, strict=True)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, engine: str, *leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = _forward(call, engine)
        _save(ctx, call, engine, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        # Compiled autograd traces the operator, which refuses double backward.
        by_operator = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return None, None, *_derive(ctx, grad_out, grad_lse, Needs(*ctx.needs_input_grad[2:]), by_operator)


# The operators

_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str"}


def _schema_type(annotation: Any) -> str:
    kinds = typing.get_args(annotation) or (annotation,)
    (kind,) = (_SCHEMA_TYPES[kind] for kind in kinds if kind is not NoneType)
    return kind + "?" * (NoneType in kinds)


_library = torch.library.Library("softkv", "DEF")
_schema = ", ".join(f"{_schema_type(kind)} {name}" for name, kind in typing.get_type_hints(Call).items())
_library.define(f"attention({_schema}, str engine) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    f"{_schema}, str engine, bool[] needs) -> ({', '.join(['Tensor'] * len(Needs._fields))})"
)


def _call(operands: Sequence[Any]) -> Call:
    return cast(Call, dict(zip(_OPERANDS, operands, strict=True)))


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, engine = arguments
    return _forward(_call(operands), engine)


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(_call(arguments[:-1]))


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *operands, engine, needs = arguments
    call = _call(operands)
    grads = _backward(grad_out, grad_lse, out, lse, Needs(*needs), call, engine)
    return tuple(out.new_empty(0) if g is None else _like(x, g) for x, g in zip(_leaves(call), grads, strict=True))


def _attention_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, out, _, *operands, _, needs = arguments
    leaves = _leaves(_call(operands))
    return tuple(torch.empty_like(x) if n else out.new_empty(0) for x, n in zip(leaves, needs, strict=True))


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, engine = inputs
    _save(ctx, _call(operands), engine, *output)


def _derive_operands(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    asked = dict(zip(_OPERANDS, ctx.needs_input_grad, strict=False))
    grads = _derive(ctx, grad_out, grad_lse, Needs(*(asked[name] for name in Needs._fields)), by_operator=True)
    of = dict(zip(Needs._fields, grads, strict=True))
    return *(of.get(name) for name in _OPERANDS), None


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


for _name, _kernel, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softkv::{_name}", _fake, lib=_library)
torch.library.register_autograd("softkv::attention", _derive_operands, setup_context=_save_operands, lib=_library)
torch.library.register_autograd("softkv::attention_backward", _refuse_double_backward, lib=_library)

_attention_op = cast(Any, torch.ops.softkv.attention.default)
_attention_backward_op = cast(Any, torch.ops.softkv.attention_backward.default)
