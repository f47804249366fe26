"""The config of an adapter that is on a model: what its values mean, written beside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from softkv.hf.learned import peft_configs
from softkv.hf.model import PromptedModel
from softkv.hf.task_heads import modules_of
from softkv.io.config import FORMAT, MODULES
from softkv.methods import METHODS
from softkv.methods.base import SoftPrompt


def configuration(model: PromptedModel, adapter: str, *, folded: bool) -> dict[str, Any]:
    """What the values of an adapter of `model` mean.

    Raises:
        ValueError: when the method is none of softkv's.
    """
    method = cast(SoftPrompt, model.adapters[adapter]).config
    names = [name for name, config in METHODS.items() if type(method) is config]
    if not names:
        raise ValueError(f"only {', '.join(METHODS)} can be saved, got {type(method).__name__}")
    config: dict[str, Any] = {
        "format": FORMAT,
        "method": names[0],
        "config": asdict(method),  # type: ignore[call-overload]
        "folded": folded,
        "base": {"name": model.config.name_or_path, "model_type": model.config.model_type, **asdict(model.base_shape)},
    }
    if beside := peft_configs(model.base):
        config["peft"] = beside
    if (saved := modules_of(model, adapter)) is not None:
        config[MODULES] = list(saved.paths)
    return config
