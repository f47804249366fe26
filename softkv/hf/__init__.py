"""Soft prompts on transformers models: the only package that knows transformers' attention contract."""

from softkv.hf.keys_values import keys_and_values
from softkv.hf.model import PromptedModel
from softkv.prefix import Prefix, read_models_by

__all__ = ["Prefix", "PromptedModel"]

read_models_by(keys_and_values)
