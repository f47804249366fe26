"""Removal of forward hooks by their owner, which also works after an interrupted registration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def unhook(owner: Any, modules: Iterable[nn.Module]) -> None:
    """Remove every forward hook and pre-hook that is a method of `owner`."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_with_kwargs.pop(number, None)
