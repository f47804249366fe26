"""The four soft-prompt methods."""

from softkv.methods.base import Method
from softkv.methods.p_tuning import PTuning
from softkv.methods.p_tuning_v2 import PTuningV2
from softkv.methods.prefix_tuning import PrefixTuning
from softkv.methods.prompt_tuning import PromptTuning
from softkv.methods.template import Template

METHODS: dict[str, type[Method]] = {
    "prompt-tuning": PromptTuning,
    "p-tuning": PTuning,
    "prefix-tuning": PrefixTuning,
    "p-tuning-v2": PTuningV2,
}

__all__ = ["METHODS", "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning", "Template"]
