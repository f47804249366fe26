"""Named ranges in torch's profiles: prefix, attention of each layer and its backward, the head run once, loss.

Without a profiler, and while compiling, a range costs one check of a flag.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()
_open = threading.local()


def named(name: str, number: int | None = None) -> AbstractContextManager[None]:
    """A range called `softkv: name number` in the profile."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NOTHING
    return _recorded(name if number is None else f"{name} {number}")


@contextmanager
def _recorded(name: str) -> Iterator[None]:
    outer, _open.name = current(), name
    try:
        with record_function(f"softkv: {name}"):
            yield
    finally:
        _open.name = outer


def current() -> str | None:
    """The name of the innermost open range, for the range of its backward."""
    return getattr(_open, "name", None)


def backward_of(name: str | None) -> AbstractContextManager[None]:
    return _NOTHING if name is None else named(f"backward of {name}")
