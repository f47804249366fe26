"""The config of an attached adapter, saved with its values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from softkv.hf.learned import peft_configs
from softkv.hf.model import PromptedModel
from softkv.hf.task_heads import modules_of
from softkv.io.config import FORMAT, MODULES, SHAPE
from softkv.methods import METHODS
from softkv.methods.base import BaseShape, SoftPrompt


def configuration(model: PromptedModel, adapter: str, *, folded: bool) -> dict[str, Any]:
    """The config of an adapter of `model`.

    Raises:
        ValueError: if the method is not registered.
    """
    method = cast(SoftPrompt, model.adapters[adapter]).config
    names = [name for name, config in METHODS.items() if type(method) is config]
    if not names:
        raise ValueError(f"only {', '.join(METHODS)} can be saved, got {type(method).__name__}")
    config: dict[str, Any] = {
        "format": FORMAT,
        "method": names[0],
        "config": _settings(method),
        "folded": folded,
        "base": {"name": model.config.name_or_path, "model_type": model.config.model_type, **sizes(model.base_shape)},
    }
    if beside := peft_configs(model.base):
        config["peft"] = beside
    if (saved := modules_of(model, adapter)) is not None:
        config[MODULES] = list(saved.paths)
    return config


def sizes(shape: BaseShape) -> dict[str, Any]:
    """Those of a base, as JSON gives them back. `widths` are told where layers differ."""
    told = {name: getattr(shape, name) for name in SHAPE}
    return told | ({"widths": [list(each) for each in shape.widths]} if shape.widths else {})


def _settings(method: Any) -> dict[str, Any]:
    """The fields of a method as JSON returns them; `where` only if it is set."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(method).items()}
    return {name: value for name, value in settings.items() if name != "where" or value is not None}
