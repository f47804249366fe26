"""Soft prompts on transformers models: the only package that knows transformers' attention contract."""

from softkv.hf.model import SoftModel, attach

__all__ = ["SoftModel", "attach"]
