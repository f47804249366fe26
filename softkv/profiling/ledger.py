"""Live bytes, from the outputs of every operator: exact on the meta device too, where nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the storages created inside it for as long as they live.

    Memory that an operator allocates and frees internally (a kernel's workspace) is not counted.

    Args:
        known: tensors that existed before, and are not counted.

    Attributes:
        live, peak: bytes, now and at most.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
