"""Untrusted safetensors files: read completely or rejected with a one-sentence error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file, all floating and finite.

    Raises:
        ValueError: if the file is damaged or contains anything else.
    """
    metadata, tensors = open_tensors(path)
    check_values(tensors, str(path))
    return metadata, tensors


def open_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return _opened(path)
    except _DAMAGE:
        pass  # may be an interrupt, which torch turns into a TypeError: a damaged file fails again below
    try:
        return _opened(path)
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless all values are finite numbers."""
    odd = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise ValueError(f"{where} expects floating values, got {', '.join(odd)}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{where} contains NaN or infinite values in {', '.join(broken)}")


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of the names, dtypes, shapes and values of tensors."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
