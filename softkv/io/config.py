"""An adapter's config, stored in the header of its safetensors file. Does not import torch, so that `softkv inspect`
starts fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

FORMAT = 3
MODULES = "modules_to_save"  # key of the config, and prefix of their tensors' names
CONFIG, WEIGHTS = "softkv_config.json", "softkv.safetensors"
SHAPE = ("layers", "kv_heads", "head_dim", "value_dim", "hidden_size", "embedding_size", "vocab_size")  # of a base
LATER = ("value_dim",)  # those missing in older files
LARGEST = 1 << 22  # characters: parsed JSON may take twenty times as much memory
_TORCH_NAMES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def parse(text: str, path: Path) -> dict[str, Any]:
    """The config in a file's header, with types checked down to the method's settings."""
    check_size(text, str(path))
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} contains no softkv config: {error}") from error
    version = config.get("format") if isinstance(config, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path} contains no softkv config: it has format {version!r}")
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this softkv reads up to {FORMAT}: upgrade softkv")
    kinds = {"method": str, "config": dict, "folded": bool, "base": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if not wrong:
        base_kinds = {"name": str, "model_type": str} | dict.fromkeys(SHAPE, int)
        base = dict.fromkeys(LATER, 0) | config["base"]
        wrong = [f"base.{key}" for key, kind in base_kinds.items() if not isinstance(base.get(key), kind)]
        beside = config.get("peft", {})
        if not isinstance(beside, dict) or not all(isinstance(each, dict) for each in beside.values()):
            wrong.append("peft")
        paths = config.get(MODULES, [])
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            wrong.append(MODULES)
    if wrong:
        raise ValueError(f"{path} has a config without a valid {', '.join(wrong)}")
    return config


def check_size(text: str, where: str) -> None:
    if len(text) > LARGEST:
        raise ValueError(f"{where} has {len(text):,} characters, expected a config of at most {LARGEST:,}")


def of_header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The config in a safetensors file's metadata."""
    if "softkv_config" not in metadata:
        raise ValueError(f"{path} was not written by softkv: its header has no softkv_config")
    return parse(metadata["softkv_config"], path)


def check_sum(config: Mapping[str, Any], metadata: Mapping[str, str], found: str, path: Path) -> None:
    """Raise if a file's checksum differs from the computed one; files of format 1 have none."""
    if config["format"] >= 2 and metadata.get("softkv_sha256") != found:
        raise ValueError(f"{path} is damaged: its values or config differ from those saved (checksum)")


def described(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config and shapes of an adapter's safetensors file; values are read for the checksum only.

    Raises:
        ValueError: if the file is damaged or of a newer version.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = sorted(safetensors.deserialize(path.read_bytes()))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    config = of_header(metadata, path)
    found = hashlib.sha256(metadata["softkv_config"].encode())
    for name, each in tensors:
        found.update(f"\n{name} {_TORCH_NAMES.get(each['dtype'])} {tuple(each['shape'])}\n".encode())
        found.update(each["data"])
    check_sum(config, metadata, found.hexdigest(), path)
    return config, {name: list(each["shape"]) for name, each in tensors}
