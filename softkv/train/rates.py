"""Learning rates: the method's own, one rate for all parameters, or a factor on the method's own.

A soft prompt's values are on the scale of the model's own embeddings, keys and values, which differ from each other and
between models, so no single rate suits all. `SoftPrompt.learning_rates` gives a method's rates; other trained
parameters (a task head, LoRA) have a separate rate.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import TrainingArguments

from softkv.hf.task_heads import SavedModules, head_of
from softkv.io.attach import SoftModel
from softkv.methods.base import SoftPrompt

# For randomly initialised modules added by a task class; and for everything pretrained, and LoRA's matrices.
HEAD_RATE = 1e-2
OTHERS_RATE = 1e-3
# transformers' default, chosen for whole models and too low for soft prompts.
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
    """The names of parameters that are soft tokens, keys or values themselves, which weight decay would pull to zero.
    Networks that compute them are not included."""
    own = {
        id(each)
        for soft in getattr(model, "adapters", {}).values()
        for name, each in soft.named_parameters()
        if "." not in name
    }
    return {name for name, each in model.named_parameters() if id(each) in own}


def split_by_rate(optimizer: Any, rates: dict[int, float]) -> None:
    """Set the rate of each parameter of an optimizer, splitting groups with different rates."""
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for each in group["params"]:
            by_rate.setdefault(rates[id(each)], []).append(each)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups[:] = groups
