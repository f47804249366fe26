"""State dicts of a `SoftModel`, as trainers write and read them: trained values and their config.

`softkv.load` takes their `model.safetensors` (of transformers' `Trainer` and its subclasses, and accelerate's
`save_state` and `save_model`) as it loads an adapter's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softkv.hf.learned import EXTRA, IN_BASE
from softkv.io.config import MODULES
from softkv.io.description import configuration
from softkv.io.safe_files import check_values, open_tensors
from softkv.methods.base import SoftPrompt

if TYPE_CHECKING:
    from softkv.hf.model import PromptedModel

FILE = "model.safetensors"
# Fixed: distributed checkpoints load into tensors of the same size, whatever the base's folder is called.
_SIZE = 4096


def described(model: PromptedModel) -> Tensor:
    """The config of this model's state dict: JSON in bytes, as uint8."""
    text = json.dumps({"active": model.active_adapter, "adapters": _configs(model)}, sort_keys=True).encode()
    padded = text.ljust(-(-len(text) // _SIZE) * _SIZE)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def check_described(model: PromptedModel, state: Tensor) -> None:
    """Raise if a state dict belongs to another method or other settings."""
    mine, theirs = _configs(model), _parse(state, "the state dict")["adapters"]
    for name in mine.keys() & theirs.keys():
        for key in ("method", "config", MODULES):
            if theirs[name].get(key) != mine[name].get(key):
                raise ValueError(
                    f"the state dict has {key} {theirs[name].get(key)} of the adapter {name!r}, "
                    f"expected {mine[name].get(key)}"
                )


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The config, as a string, and the tensors of the active adapter of a state dict.

    Raises:
        ValueError: if the file is damaged, or not a state dict of a `SoftModel`.
    """
    _, tensors = open_tensors(path)
    before = next((name.removesuffix(EXTRA) for name in tensors if name.split(".")[-1] == EXTRA), None)
    if before is None:
        raise ValueError(f"{path} contains no soft prompt: it is not a state dict of a SoftModel")
    description = _parse(tensors.pop(before + EXTRA), str(path))
    name = description["active"]
    if name not in description["adapters"]:
        raise ValueError(f"{path} describes no adapter {name!r}")
    adapter = f"{before}adapters.{name}."
    found = {key.removeprefix(adapter): each for key, each in tensors.items() if key.startswith(adapter)}
    found |= {key.removeprefix(before): each for key, each in tensors.items() if key.startswith(before + IN_BASE)}
    modules = f"{before}{MODULES}.{name}."
    found |= {  # whose paths have "/" for "." in state dicts
        f"{MODULES}.{key.removeprefix(modules).replace('/', '.')}": each
        for key, each in tensors.items()
        if key.startswith(modules)
    }
    check_values(found, str(path))
    return json.dumps(description["adapters"][name]), found


def _configs(model: PromptedModel) -> dict[str, dict[str, Any]]:
    softs = {name: soft for name, soft in model.adapters.items() if isinstance(soft, SoftPrompt)}
    return {name: configuration(model, name, folded=not soft.foldable) for name, soft in softs.items()}


def _parse(state: Tensor, where: str) -> dict[str, Any]:
    try:
        found = json.loads(bytes(state.cpu().to(torch.uint8).flatten().tolist()))
        if isinstance(found["active"], str) and isinstance(found["adapters"], dict):
            return found
    except (ValueError, RecursionError, KeyError, TypeError, RuntimeError):
        pass
    raise ValueError(f"{where} has no softkv config: it is not a state dict of a SoftModel")
