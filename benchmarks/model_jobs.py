"""Shared by the benchmarks on a whole model: the model's source and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import smollm2, tiny

SEED = 0
LOADERS = {"SmolLM2-135M-Instruct": smollm2.load, "tiny": tiny.load}


@dataclass(frozen=True)
class ModelSettings:
    """The model, where it runs and in which dtype; all of it is in the results."""

    model: str
    device: str
    dtype: str

    @classmethod
    def of(cls, device: str, quick: bool) -> ModelSettings:
        name = "tiny" if quick else "SmolLM2-135M-Instruct"
        return cls(name, device, "bfloat16" if device == "cuda" else "float32")


def fetch(settings: ModelSettings) -> None:
    """Download the model before several processes ask for it at once."""
    if settings.model != "tiny":
        smollm2.obtain()


class ModelJob:
    """A provider in a process of its own (`processes.TimedJob`)."""

    def __init__(self, settings: ModelSettings) -> None:
        import torch

        torch.manual_seed(SEED)
        self.settings = settings

    def load(self) -> tuple[Any, Any]:
        import torch

        model, tokenizer = LOADERS[self.settings.model]()
        return model.to(self.settings.device, getattr(torch, self.settings.dtype)), tokenizer

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: x.to(self.settings.device) if hasattr(x, "to") else x for name, x in batch.items()}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        import torch

        if self.settings.device == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float | None:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.settings.device == "cuda" else None
