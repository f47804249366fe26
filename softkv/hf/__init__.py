"""Soft prompts on transformers models: the only package that knows transformers' attention contract."""

from softkv.hf.model import PromptedModel

__all__ = ["PromptedModel"]
