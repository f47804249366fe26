"""State of a call rather than of the model: the active adapter, whether soft prompts are enabled, and the running
calls.

Scopes (`using`, `disabled`) are context variables: threads and asyncio tasks do not see each other's. A call runs in a
single thread, so running calls are a stack per thread. Compiled code can guard on thread-local lists but not on context
variables, so it uses the scopes entered by the thread.
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
    """What a `with` block sets for one SoftModel: an adapter, or that soft prompts are disabled."""

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
    """Enter a scope for the calls of this context."""
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
    """The adapter of the innermost `using` of a model; None outside one."""
    found = None
    for each in _scopes_entered():
        if each.model is model and each.adapter is not None:
            found = each.adapter
    return found


def is_enabled(model: Any) -> bool:
    """Whether this context is outside every `disabled` of a model."""
    return all(each.model is not model or not each.disabled for each in _scopes_entered())


def current() -> Any:
    """The innermost running call of this thread; None outside a call."""
    calls = _thread.calls
    return calls[-1] if calls else None


def run(call: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function as the innermost call of this thread. With None, models in it run bare, as outside a call."""
    # Not a context manager: an interrupt between its entry and the block would leave the call behind.
    calls = _thread.calls
    depth = len(calls)
    try:
        calls.append(call)
        return function(*args, **kwargs)
    finally:
        del calls[depth:]
