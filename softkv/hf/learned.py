"""The trained state of a `SoftModel`: its soft prompts, adapters that peft injected into the base (LoRA and similar,
frozen or not), and every parameter of the base that requires gradients.

State dicts contain exactly this, so any trainer's checkpoint does; it is also saved with a soft prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softkv.hf.sharded import sharded_like

if TYPE_CHECKING:
    from softkv.hf.model import PromptedModel

IN_BASE = "base."  # prefix of the names of the base's parameters
EXTRA = "_extra_state"
# Initialisations that leave the base's weights unchanged; others subtract a part of them.
_STARTS = (True, False, "gaussian", "orthogonal")


def learned_in(base: nn.Module) -> dict[str, nn.Parameter]:
    """The learned parameters of a base, by name."""
    injected = _injected(base)
    return {name: each for name, each in base.named_parameters() if each.requires_grad or id(each) in injected}


def _injected(base: nn.Module) -> set[int]:
    """The parameters that peft injected into the base."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = set()
    for module in base.modules():
        beside_lora = isinstance(module, AuxiliaryTrainingWrapper) and getattr(base, "peft_config", None)
        if isinstance(module, BaseTunerLayer) or beside_lora:
            own = (
                each for name, each in module.named_parameters() if not name.startswith(("base_layer.", "original_"))
            )
            found |= {id(each) for each in own}
    return found


def peft_configs(base: Any) -> dict[str, dict[str, Any]]:
    """The configs of the adapters that peft injected into a base, by name, for JSON.

    Raises:
        ValueError: for an adapter whose initialisation changed the base's own weights, which are not saved.
    """
    found = {}
    for name, config in getattr(base, "peft_config", {}).items():
        start = getattr(config, "init_lora_weights", True)
        if start not in _STARTS:
            raise ValueError(
                f"the LoRA {name!r} was initialised with init_lora_weights={start!r}, which changes the base's own "
                "weights, so its values mean nothing on another copy of the base: expected True, False or 'gaussian'"
            )
        fields = config.to_dict()
        found[name] = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    return found


def inject(base: Any, configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Inject adapters that a base lacks, frozen, and return their names.

    Raises:
        ValueError: if peft is not installed, or does not support the adapter.
    """
    missing = {name: fields for name, fields in configs.items() if name not in getattr(base, "peft_config", {})}
    if not missing:
        return []
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"this soft prompt was trained with {', '.join(missing)}, which needs peft") from error
    for name, fields in missing.items():
        try:
            config = PeftConfig.from_peft_type(**fields)
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = True
            base.add_adapter(config, adapter_name=name)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"the adapter {name!r} of this soft prompt can't be injected: {error}") from error
    before = learned_in(base)
    for name, parameter in before.items():
        if any(f".{each}." in name for each in missing):
            parameter.requires_grad_(False)
    return list(missing)


def check_learned(base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless these are learned parameters of the base, and include every trained one."""
    known = learned_in(base)
    unknown = sorted(name for name in tensors if name not in known)
    trained = sorted(name for name, each in known.items() if each.requires_grad and name not in tensors)
    if unknown or trained:
        raise ValueError(
            f"the base's trained parameters don't match this base: the file also has {_some(unknown)}, this base also "
            f"trains {_some(trained)} (inject the same adapters, or set requires_grad of the same parameters, first)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != known[name].shape:
            raise ValueError(
                f"{name} of the base has shape {tuple(known[name].shape)}, the file's {tuple(tensor.shape)}"
            )


@torch.no_grad()
def put_learned(base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the learned parameters of a base, after `check_learned`."""
    known = learned_in(base)
    for name, tensor in tensors.items():
        known[name].copy_(sharded_like(tensor, known[name]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def leave_frozen(model: PromptedModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook of a `SoftModel`: removes frozen parameters."""
    kept = {f"{prefix}{IN_BASE}{name}" for name in learned_in(model.base)}
    for name in [name for name in state if name.startswith(prefix + IN_BASE) and name not in kept]:
        del state[name]


def ignore_missing_frozen(model: PromptedModel, incompatible: Any) -> None:
    """Load hook of a `SoftModel`: frozen parameters and the config may be missing in a state dict."""
    learned = learned_in(model.base)

    def optional(name: str) -> bool:
        inner = f".{name}".partition(f".{IN_BASE}")[2]
        return (inner != "" and inner not in learned) or name.split(".")[-1] == EXTRA

    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not optional(name)]
