"""The model API that trainers, pipelines and users expect; missing attributes come from the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from softkv.hf import checkpointing, checks
from softkv.hf.inner import inside
from softkv.hf.placement import device_of


class ModelInterfaceMixin(nn.Module):
    """A module that forwards missing attributes to its `base`."""

    base: Any

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            if name in checks.PAGED:
                raise AttributeError(checks.PAGED[name]) from None
            return inside(self, getattr(self.base, name))

    @property
    def generation_config(self) -> Any:
        """The base's, to be read and set."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base.generation_config = config

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The base's decoder; calling it returns hidden states with the soft prompt."""
        return inside(self, self.base.get_decoder(*args, **kwargs))

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The base's encoder, if it has one."""
        return inside(self, self.base.get_encoder(*args, **kwargs))

    def get_base_model(self) -> Self:
        """This model itself, because callers of this method must get the soft prompt. The frozen model is `base`."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of the base's inputs."""
        return device_of(self.base)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Allocate tensors on "meta" on a device without values, and move the others there with their values: learned
        parameters, and tables computed by the base."""
        return self._apply(
            lambda each: torch.empty_like(each, device=device) if each.is_meta else each.to(device), recurse
        )

    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trainable and of all parameters, including the base's, as in PEFT."""
        return self.num_trainable(), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the trainable share, as in PEFT."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, because a soft prompt does not change the base's weights."""
        raise NotImplementedError(
            "a soft prompt can't be merged into the weights of its base, as LoRA can. softkv.bake makes "
            "soft tokens or a text a prefix, save_pretrained(format='peft') writes PEFT's files, detach() gives the "
            "base back"
        )

    merge_adapter = unmerge_adapter = merge_and_unload

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Like transformers' `num_parameters`, including learned parameters."""
        from transformers import PreTrainedModel

        return PreTrainedModel.num_parameters(self, only_trainable, exclude_embeddings)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in backward. A prefix needs the non-reentrant variant, transformers' default.

        Raises:
            ValueError: for `use_reentrant=True`.
        """
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        checks.check_reentrant(kwargs)
        wanted_input_gradients = hasattr(self.base, "_require_grads_hook")
        checkpointing.enable(self.base, kwargs, **options)
        if not wanted_input_gradients:  # for reentrant checkpoints; here they would only cost layer 0 its backward
            self.base.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refused, because another attention implementation would ignore the prefix."""
        raise ValueError(
            "a soft prompt needs softkv's attention: detach it before set_attn_implementation (backend=... of "
            "softkv.attach selects the engine)"
        )
