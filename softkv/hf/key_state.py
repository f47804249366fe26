"""The tensor returned by softkv's mask function and read by its attention function. It is opaque to the model:
computing with it raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_MOVED = {"to", "cpu", "cuda", "detach", "clone", "contiguous", "requires_grad_", "type"}  # still a key state
_STILL_REAL = {"to", "__getitem__", "expand", "detach", "contiguous"}
_ASKED = {
    "__get__", "dim", "size", "stride", "numel", "is_floating_point", "is_complex", "is_contiguous", "element_size",
    "data_ptr", "untyped_storage", "storage_offset", "__len__", "__repr__", "__format__", "get_device", "as_subclass",
}  # fmt: skip


class UnpaddedMask(Tensor):
    """A padding mask `[B, T]` known to contain no padding without reading it."""

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device) -> UnpaddedMask:
        return torch.ones(1, dtype=torch.bool, device=device).expand(shape).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found.as_subclass(cls) if func.__name__ in _STILL_REAL else found


class KeyState(Tensor):
    """A tensor that can be moved and inspected, but not computed with.

    Attributes:
        rows: position ids, and the packed rows found in them by a block (`softkv.hf.packing`), or None.
    """

    rows: tuple[Any, Any] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name == "__getitem__" and _of_last_queries(*args):
            return args[0]  # queries stand at the end of the keys: the state is theirs too
        if name not in _MOVED and name not in _ASKED:
            raise ValueError(
                "this model computes with its attention masks, which softkv attention does not offer: use "
                'attn_implementation="eager"'
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found.as_subclass(KeyState) if name in _MOVED else found

    @property
    def bare(self) -> Tensor:
        """The tensor itself."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _of_last_queries(state: Tensor, index: Any) -> bool:
    """Whether an index takes a mask's last queries, or all. (Packed rows are told by that axis, and stay whole.)"""
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(each, slice) for each in index):
        return False
    *others, queries = index[0], index[1], index[3], index[2]
    start = queries.start or 0
    ends = queries.stop is None and queries.step is None and (start == 0 or (start < 0 and state.size(2) == 1))
    return ends and all(each == slice(None) for each in others)
