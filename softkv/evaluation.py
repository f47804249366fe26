"""Evaluation mode without changing a module that other threads use at the same time."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def in_evaluation(module: Module) -> Module:
    """The module in evaluation mode: the module itself if it already is, else a view of it.

    A view is a tree of new modules that share parameters, buffers, hooks and everything else with the given ones,
    except for the training flags and attributes that modules set while they run, so other threads see no change.
    (BigBird permanently switches its sparse attention off at the first short row.)
    """
    if not any(each.training or hasattr(each, "set_attention_type") for each in module.modules()):
        return module
    views: dict[int, Any] = {}
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            views[id(each)] = each
        else:
            views[id(each)] = view = each.__class__.__new__(each.__class__)
            view.__dict__.update(each.__dict__, training=False)
    for view in views.values():
        if isinstance(view, torch.jit.ScriptModule):
            continue
        for name, value in view.__dict__.items():
            view.__dict__[name] = _bound_to_views(value, views)
        view.__dict__["_modules"] = {
            name: each if each is None else views[id(each)] for name, each in view.__dict__["_modules"].items()
        }
    return views[id(module)]


def _bound_to_views(value: Any, views: dict[int, Any]) -> Any:
    """Bind methods that were set on a module instance (as offloading does) to its view."""
    if isinstance(value, MethodType) and id(value.__self__) in views:
        return MethodType(value.__func__, views[id(value.__self__)])
    if isinstance(value, partial):
        return partial(value.func, *(views.get(id(each), each) for each in value.args), **value.keywords)
    return value
