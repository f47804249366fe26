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
    """A frozen model with one or more soft prompts, returned by `softkv.attach`. Other attributes are those of the
    base.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by name; the one of `attach` is "default".
        active_adapter: the name of the adapter used by calls without `adapter_names`.
    """

    def add_adapter(
        self,
        name: str,
        adapter: Method | Prefix | str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Add a soft prompt. The active adapter stays active.

        Args:
            name: a new name, of letters, digits, spaces, "_" and "-", at most 255 bytes long.
            adapter: a method, which is built; the folder or Hub id of a saved adapter, as in `softkv.load`; or a prefix
                of one row (A = 1), which is trained further as `PTuningV2`.
            tokenizer: of the base, to initialise from a text; None: the one passed to `attach`.
            modules_to_save: as in `attach`; a saved adapter has its own.

        Raises:
            ValueError: if the name is taken or invalid, or the adapter does not match the base. Nothing is added then.
            TypeError: if the adapter is none of these.
            FileNotFoundError: if the folder contains no adapter.

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> model.add_adapter("terse", softkv.PromptTuning(length=2))
            >>> ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
            >>> model(ids, adapter_names=["terse", "default"]).logits.shape[:2]
            torch.Size([2, 3])
        """
        if isinstance(adapter, str | os.PathLike):
            self._check_new_name(name)
            adapter = checkpoint.saved(self.base, *checkpoint.read_for_shared_base(hub.local(adapter)))
        super().add_adapter(name, adapter, tokenizer=tokenizer, modules_to_save=modules_to_save)

    def get_extra_state(self) -> Tensor:
        """The config of the values in `state_dict()`, as JSON in bytes, which makes any trainer's checkpoint
        loadable."""
        return state.described(self)

    def set_extra_state(self, described: Tensor) -> None:
        """Check that a state dict belongs to the same adapters.

        Raises:
            ValueError: if it belongs to another method or other settings. Nothing is changed then.
        """
        state.check_described(self, described)

    def save_pretrained(self, save_directory: Any, *, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Write `softkv_config.json` and `softkv.safetensors`: the learned values of an adapter, not the base. Without
        a name, the active adapter is saved."""
        with self.using(self.active_adapter if adapter_name is None else adapter_name):
            checkpoint.save(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save the adapter to a repository on the Hugging Face Hub (see `softkv.io.hub.push`)."""
        return hub.push(self, repo_id, **kwargs)
