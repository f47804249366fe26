"""softkv: attention that reads soft-prompt prefixes as an operand of its own, and the four methods that train them."""

from typing import TYPE_CHECKING, Any

from softkv.attention import prefix_attention, prefix_attention_varlen
from softkv.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2, Template
from softkv.prefix import Prefix

if TYPE_CHECKING:
    from softkv.batches import PackingCollator, PaddingCollator
    from softkv.checkpoint import load
    from softkv.hf import SoftModel, attach
    from softkv.training import Trainer

__version__ = "0.1.0"

__all__ = [
    "PTuning",
    "PTuningV2",
    "PackingCollator",
    "PaddingCollator",
    "Prefix",
    "PrefixTuning",
    "PromptTuning",
    "SoftModel",
    "Template",
    "Trainer",
    "attach",
    "load",
    "prefix_attention",
    "prefix_attention_varlen",
]

# transformers takes seconds to import, so what needs it is imported at first use.
_LAZY = {
    "SoftModel": "softkv.hf",
    "attach": "softkv.hf",
    "load": "softkv.checkpoint",
    "PackingCollator": "softkv.batches",
    "PaddingCollator": "softkv.batches",
    "Trainer": "softkv.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'softkv' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
