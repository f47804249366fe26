"""Runs a model on the shapes of its tensors, so that the allocations of models of any size can be counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_BY_MASK = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_LSTM = _aten.mkldnn_rnn_layer.default


class ShapesOnly(TorchDispatchMode):
    """A mode in which floating-point tensors are torch's fake tensors, with a shape and a lifetime but no values.
    Integers and masks have values, so that code can read where rows start, end and have labels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def strip(self, module: nn.Module) -> None:
        """Replace a module's parameters and buffers by fake tensors on the CPU, which frees their memory."""
        known: dict[int, Tensor] = {}
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if tensor.is_floating_point():
                    if id(tensor) not in known:
                        known[id(tensor)] = self._like(tensor)
                    setattr(part, name, known[id(tensor)])

    def _like(self, tensor: Tensor) -> Tensor:
        with self.fakes:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if not isinstance(tensor, nn.Parameter):
            return fake
        parameter = nn.Parameter(fake, tensor.requires_grad)
        if tensor.requires_grad:
            with self.fakes:
                parameter.grad = torch.empty_like(fake)  # a step accumulates into it
        return parameter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_shapes(func, args, kwargs)
        if not tensors:  # it makes one
            made = self._on_shapes(func, args, kwargs)
            if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(made)):
                return made
        return tree_map_only(Tensor, self._without_values, func(*args, **kwargs))

    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _BY_MASK:  # fake tensors can't give the number of selected elements
            args = (args[0], [at for index in args[1] for at in _positions(index)], *args[2:])
        with self.fakes:
            made = func(*args, **kwargs)
            # What oneDNN's LSTM saves is internal. Count at least what gradients need: four gates, the cell and its
            # tanh.
            return (*made[:3], made[0].new_empty(6 * made[0].numel())) if func is _LSTM else made

    def _without_values(self, tensor: Tensor) -> Tensor:
        return self.fakes.from_tensor(tensor) if tensor.is_floating_point() else tensor


def _positions(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero().unbind(1))
