"""`SoftModel`: a soft prompt on a frozen transformers model, with storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softkv.hf.model import PromptedModel
from softkv.io import checkpoint, hub, state
from softkv.methods.base import Method
from softkv.prefix import Prefix


class SoftModel(PromptedModel):
    """A frozen model with one or more soft prompts, made by `softkv.attach`. Other attributes come from the base.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by its name; that of `attach` is "default".
        active_adapter: the name of the adapter that calls without `adapter_names` use.
    """

    def add_adapter(
        self,
        name: str,
        adapter: Method | Prefix | str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Adds a soft prompt. The active adapter stays active.

        Args:
            name: a new name, of letters, digits, spaces, "_" and "-", at most 255 bytes long.
            adapter: a method, which is built; the folder or Hub id of a saved adapter, as in `softkv.load`; or a prefix
                of one row (A = 1), which is trained further as `PTuningV2`.
            tokenizer: of the base, for an init from a text; None takes that of `attach`.
            modules_to_save: as in `attach`; a saved adapter brings its own.

        Raises:
            ValueError: when the name is taken or none, or the adapter does not fit the base. Nothing is added then.
            TypeError: when the adapter is none of these.
            FileNotFoundError: when the folder holds no adapter.

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> model.add_adapter("terse", softkv.PromptTuning(length=2))
            >>> ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
            >>> model(ids, adapter_names=["terse", "default"]).logits.shape[:2]
            torch.Size([2, 3])
        """
        if isinstance(adapter, str | os.PathLike):
            self._check_new_name(name)
            adapter = checkpoint.saved(self.base, *checkpoint.prompt_alone(hub.local(adapter)))
        super().add_adapter(name, adapter, tokenizer=tokenizer, modules_to_save=modules_to_save)

    def get_extra_state(self) -> Tensor:
        """What the values in `state_dict()` mean, as the bytes of a JSON text: any trainer's checkpoint loads by it."""
        return state.described(self)

    def set_extra_state(self, described: Tensor) -> None:
        """Checks that a state dict is of the same adapters.

        Raises:
            ValueError: when it is of another method or of other settings. Nothing has changed then.
        """
        state.check_described(self, described)

    def save_pretrained(self, save_directory: Any, *, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Writes `softkv_config.json` and `softkv.safetensors`: what an adapter has learned, not the base. Without a
        name, the active one is saved."""
        with self.using(self.active_adapter if adapter_name is None else adapter_name):
            checkpoint.save(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves what is learned to a repository on the Hugging Face Hub (`softkv.io.hub.push`)."""
        return hub.push(self, repo_id, **kwargs)
