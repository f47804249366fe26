"""State that belongs to a call and not to the model: which adapter is active, whether soft prompts are enabled, and
which calls are under way.

Scopes (`using`, `disabled`) are context variables: threads and asyncio tasks do not see each other's. Calls run from
start to end in one thread, so they are a stack of that thread. Compiled code can guard on lists of a thread but not on
context variables: there, the scopes that the thread has entered count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scope:
    """What a `with` block settles for one SoftModel: an adapter, or that soft prompts are off."""

    model: Any
    adapter: str | None = None
    disabled: bool = False


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.scopes: list[Scope] = []


_thread = _Thread()
_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("softkv_scopes", default=())


@contextmanager
def scope(entered: Scope) -> Iterator[None]:
    """Settles something for the calls of this context."""
    of_thread = _thread.scopes
    token = _scopes.set((*_scopes.get(), entered))
    try:
        of_thread.append(entered)
        yield
    finally:
        of_thread[:] = [each for each in of_thread if each is not entered]
        _scopes.reset(token)


def _scopes_entered() -> Sequence[Scope]:
    return _thread.scopes if torch.compiler.is_compiling() else _scopes.get()


def adapter_in_scope(model: Any) -> str | None:
    """The adapter of the innermost `using` of a model; None outside of any."""
    found = None
    for each in _scopes_entered():
        if each.model is model and each.adapter is not None:
            found = each.adapter
    return found


def is_enabled(model: Any) -> bool:
    """Whether this context is in no `disabled` of a model."""
    return all(each.model is not model or not each.disabled for each in _scopes_entered())


def current() -> Any:
    """The innermost call of this thread; None outside of any."""
    calls = _thread.calls
    return calls[-1] if calls else None


def run(call: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a function as the innermost call of this thread. With None, it sees bare models, as outside of any call."""
    # Not a context manager: an interrupt between its entry and the block would leave the call behind.
    calls = _thread.calls
    depth = len(calls)
    try:
        calls.append(call)
        return function(*args, **kwargs)
    finally:
        del calls[depth:]
