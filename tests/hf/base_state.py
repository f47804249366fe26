"""The state of a base, to be the same after `detach`."""

from typing import Any

import torch
from torch import nn

from softkv.hf import checkpointing


def state_of(model: Any) -> list[Any]:
    """Everything that detaching gives back."""
    return [
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)},
        {name: module._forward_pre_hooks.copy() for name, module in model.named_modules()},
        {name: module._forward_hooks.copy() for name, module in model.named_modules()},
        {name: sorted(module.__dict__) for name, module in model.named_modules()},
        model.config._attn_implementation,
        model.config.to_dict(),
        checkpointing.is_on(model),
    ]


def assert_same_state(got: list[Any], want: list[Any]) -> None:
    for name, parameter in want[0].items():
        assert torch.equal(got[0][name], parameter), name
    assert got[1:] == want[1:]
