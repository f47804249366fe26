"""Learning rates: each method's own, a number for all that is learned, or a factor on the method's own.

A soft prompt's values live on the scale of the model's own embeddings, keys and values, which differ between models and
from each other, so no one rate suits all. `SoftPrompt.learning_rates` tells a method's; what is trained beside it (a
task's head, LoRA) has a rate of its own.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import TrainingArguments

from softkv.hf.task_heads import SavedModules, head_of
from softkv.io.model import SoftModel
from softkv.methods.base import SoftPrompt

# What a task's class adds to its base, drawn at random; and all else that is pretrained, or LoRA's matrices.
HEAD_RATE = 1e-2
OTHERS_RATE = 1e-3
# transformers' default, made for whole models: no soft prompt learns at it.
DEFAULT_OF_TRANSFORMERS: float = TrainingArguments.__dataclass_fields__["learning_rate"].default


def own_rates(model: SoftModel) -> dict[int, float]:
    """The method's own rate of each trained parameter, by the parameter's `id`."""
    rates = {id(each): OTHERS_RATE for each in model.parameters() if each.requires_grad}
    for saved in model.modules_to_save.values():
        head = [module for name, module in cast(SavedModules, saved).items() if name in head_of(model.base)]
        rates |= {id(each): HEAD_RATE for module in head for each in module.parameters()}
    for soft in model.adapters.values():
        names = cast(SoftPrompt, soft).learning_rates()
        rates |= {id(each): names[name] for name, each in soft.named_parameters() if each.requires_grad}
    return rates


def prompt_names(model: nn.Module) -> set[str]:
    """The names of parameters that are soft prompts themselves: values that stand for tokens, which decay would pull to
    nothing. (Networks that compute them are none.)"""
    own = {
        id(each)
        for soft in getattr(model, "adapters", {}).values()
        for name, each in soft.named_parameters()
        if "." not in name
    }
    return {name for name, each in model.named_parameters() if id(each) in own}


def split_by_rate(optimizer: Any, rates: dict[int, float]) -> None:
    """Gives each parameter of an optimizer its rate: its groups are split where rates differ."""
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for each in group["params"]:
            by_rate.setdefault(rates[id(each)], []).append(each)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups[:] = groups
