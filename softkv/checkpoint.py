"""Adapters on disk: `softkv.safetensors` (what is learned) and `softkv_config.json` (what it means).

The safetensors file carries the config in its header too, so that the pair is written in one atomic step: a save that
is killed leaves the old adapter or the new one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from softkv.hf.model import SoftModel
from softkv.methods import METHODS
from softkv.methods.base import FrozenModel, Method, SoftPrompt

FORMAT = 1
CONFIG, WEIGHTS = "softkv_config.json", "softkv.safetensors"
_SHAPE = ("layers", "kv_heads", "head_dim", "hidden_size", "embedding_size", "vocab_size")


def save(model: SoftModel, directory: str | os.PathLike[str], *, folded: bool = True) -> None:
    """Writes a soft prompt to `directory`, replacing an older one atomically.

    Args:
        model: the model that holds it.
        directory: made where it doesn't exist.
        folded: keep what inference needs: reparametrisations and the prompt encoder of P-tuning are computed once and
            left out. False keeps them, to train on.

    Raises:
        ValueError: when a learned parameter is NaN or infinite.
    """
    soft = model.soft.folded() if folded else model.soft
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in soft.state_dict().items()}
    _check_finite(tensors)
    method = next(name for name, config in METHODS.items() if isinstance(model.method, config))
    config = {
        "format": FORMAT,
        "method": method,
        "config": asdict(model.method),  # type: ignore[call-overload]
        "folded": folded,
        "base": {"name": model.config.name_or_path, "model_type": model.config.model_type, **asdict(model.base_shape)},
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"softkv_config": text}))
    _replace(directory / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    encoder: nn.Module | None = None,
    backend: str | None = None,
) -> SoftModel:
    """Puts a saved soft prompt on a transformers model.

    Args:
        model: the base that it was trained on.
        directory: a folder that `save_pretrained` wrote, or the id of a repository on the Hugging Face Hub.
        tokenizer: needed where an encoder that reads a prompt text was kept (`folded=False`).
        encoder: the module of a P-tuning v2 adapter that was trained with a module of one's own.
        backend: of `softkv.prefix_attention`; None chooses by device.

    Returns:
        A `SoftModel` in evaluation mode.

    Raises:
        FileNotFoundError: when there is no adapter.
        ValueError: when the files are damaged, of a newer version, or of another base model. Nothing is attached then.
    """
    config, tensors = read(_local(directory))
    method = _method(config, encoder)
    soft_model = SoftModel(
        model, _Saved(method, config["folded"], config["base"]), tokenizer=tokenizer, backend=backend
    )
    try:
        put(soft_model.soft, tensors)
    except ValueError:
        soft_model.detach()
        raise
    name = model.config.name_or_path
    if config["base"]["name"] and name and name != config["base"]["name"]:
        warnings.warn(f"this soft prompt was trained on {config['base']['name']}, not on {name}", stacklevel=2)
    return soft_model.eval()


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter, checked for damage; nothing is unpickled."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        hint = f"; {pickles[0]} is a pickle, which softkv never reads: convert it to safetensors" if pickles else ""
        raise FileNotFoundError(f"{directory} holds no soft prompt: expected {CONFIG} and {WEIGHTS}{hint}")
    outer = _parse((directory / CONFIG).read_text(encoding="utf-8"), directory / CONFIG)
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / WEIGHTS} is damaged: {error}") from error
    # A save that was killed between the two files leaves an older config.json: the weights carry their own.
    config = _parse(metadata["softkv_config"], directory / WEIGHTS) if "softkv_config" in metadata else outer
    _check_finite(tensors)
    return config, tensors


def put(soft: SoftPrompt, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into a soft prompt, all or none.

    Raises:
        ValueError: when names or shapes don't fit.
    """
    expected = soft.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"the adapter's tensors don't fit its config: missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"the adapter's tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"this model needs {tuple(expected[name].shape)}: it was trained on another base model"
            )
    soft.load_state_dict(dict(tensors))


class _Saved(Method):
    """A method whose module is built to load saved values into, after the base was found to be the right one."""

    def __init__(self, method: Method, folded: bool, base: dict[str, Any]) -> None:
        self.method, self.folded, self.base, self.template = method, folded, base, method.template

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        shape = asdict(base.shape)
        differing = {name: (self.base[name], shape[name]) for name in _SHAPE if self.base[name] != shape[name]}
        if differing:
            details = ", ".join(f"{name} {saved} (this model: {here})" for name, (saved, here) in differing.items())
            raise ValueError(f"this soft prompt was trained on another base model: {details}")
        return self.method.build(base, folded=self.folded)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
        version = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no softkv config: {error}") from error
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{path} has format {version}, this softkv reads up to {FORMAT}: upgrade softkv")
    lacking = [key for key in ("method", "config", "folded", "base") if key not in config]
    lacking += [f"base.{key}" for key in ("name", *_SHAPE) if key not in config.get("base", {})]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    return config


def _method(config: dict[str, Any], encoder: nn.Module | None) -> Method:
    name = config["method"]
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: this softkv knows {', '.join(METHODS)}")
    known = {field.name for field in fields(METHODS[name])}  # type: ignore[arg-type]
    unknown = sorted(config["config"].keys() - known)
    if unknown:
        raise ValueError(f"unknown settings of {name}: {', '.join(unknown)}")
    method = METHODS[name](**config["config"])
    return method if encoder is None else replace(method, encoder=encoder)  # type: ignore[type-var]


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the soft prompt holds NaN or infinite values in {', '.join(broken)}")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _local(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory)
    if path.exists() or not isinstance(directory, str) or directory.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(directory, allow_patterns=[CONFIG, WEIGHTS]))
