"""Modules inside the frozen model, called with the soft prompt in place.

Losses that need hidden states rather than logits, such as TRL's fused head, call `model.base_model`, `model.model` or
`model.get_decoder()` directly. Bypassing `SoftModel.forward`, those modules would run without the soft prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from softkv.hf.frozen import decoder_of
from softkv.hf.layout import with_prompt_lengths

if TYPE_CHECKING:
    from softkv.hf.model import PromptedModel


# The order of `forward`'s arguments, in transformers' causal language models as in `SoftModel`.
_FORWARD = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")


class PromptedSubmodule:
    """A module of the base that contains its decoder. A call takes the arguments of `SoftModel.forward` and returns the
    module's own output, with hidden states aligned to the given columns; other attributes are the module's.

    Args:
        model: the soft model.
        module: of its base.
    """

    def __init__(self, model: PromptedModel, module: nn.Module) -> None:
        self.__dict__.update(_model=model, _module=module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs, softkv_inner=self._module)

    def __getattr__(self, name: str) -> Any:
        if name in ("_model", "_module"):  # during copying
            raise AttributeError(name)
        return inside(self._model, getattr(self._module, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __repr__(self) -> str:
        return f"{type(self._module).__name__} with a soft prompt"


def inside(model: Any, value: Any) -> Any:
    """An attribute of the base, wrapped with the soft prompt if it is a module that runs the decoder (or the encoder of
    an encoder-decoder)."""
    if not isinstance(value, nn.Module):
        return value
    stacks = [decoder_of(model.base), *([model.base.get_encoder()] if model.config.is_encoder_decoder else [])]
    return (
        PromptedSubmodule(model, value)
        if any(module is stack for module in value.modules() for stack in stacks)
        else value
    )


def say_prompt_lengths(model: PromptedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keyword pre-hook of a `SoftModel` whose `forward` was replaced by one that does not pass labels on:
    `prompt_lengths` then marks where prompts end."""
    if "forward" not in vars(model) or model.answers == "target":
        return None
    batch = dict(zip(_FORWARD, args, strict=False)) | kwargs
    if batch.get("labels") is None or batch.get("prompt_lengths") is not None:
        return None
    return (), batch | {"prompt_lengths": with_prompt_lengths(batch)["prompt_lengths"]}
