"""softkv: attention that takes a soft-prompt prefix as a separate operand, and four methods that train such
prefixes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softkv.io.attach import attach, load
    from softkv.io.baking import bake
    from softkv.io.peft_model import from_peft
    from softkv.io.soft_model import SoftModel
    from softkv.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2, Template
    from softkv.ops.api import prefix_attention, prefix_attention_varlen
    from softkv.prefix import Prefix
    from softkv.train.batches import PackingCollator, PaddingCollator, Seq2SeqCollator, TaskCollator
    from softkv.train.seq2seq import Seq2SeqTrainer
    from softkv.train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "PTuning",
    "PTuningV2",
    "PackingCollator",
    "PaddingCollator",
    "Prefix",
    "PrefixTuning",
    "PromptTuning",
    "Seq2SeqCollator",
    "Seq2SeqTrainer",
    "SoftModel",
    "TaskCollator",
    "Template",
    "Trainer",
    "attach",
    "bake",
    "from_peft",
    "load",
    "prefix_attention",
    "prefix_attention_varlen",
]

# Names are imported at first use, because torch and transformers take seconds to import.
_LAZY = {
    "PTuning": "softkv.methods",
    "PTuningV2": "softkv.methods",
    "PackingCollator": "softkv.train.batches",
    "PaddingCollator": "softkv.train.batches",
    "Prefix": "softkv.hf",
    "PrefixTuning": "softkv.methods",
    "PromptTuning": "softkv.methods",
    "Seq2SeqCollator": "softkv.train.batches",
    "Seq2SeqTrainer": "softkv.train.seq2seq",
    "SoftModel": "softkv.io.soft_model",
    "TaskCollator": "softkv.train.batches",
    "Template": "softkv.methods",
    "Trainer": "softkv.train.trainer",
    "attach": "softkv.io.attach",
    "bake": "softkv.io.baking",
    "from_peft": "softkv.io.peft_model",
    "load": "softkv.io.attach",
    "prefix_attention": "softkv.ops.api",
    "prefix_attention_varlen": "softkv.ops.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'softkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
