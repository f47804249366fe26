"""Adapters on disk: `softkv.safetensors` (the learned values) and `softkv_config.json` (their config).

The safetensors header contains the config too, so that a save is one atomic step: a killed save leaves either the old
adapter or the new one. The header is authoritative; `softkv_config.json` is informational. A checksum of config and
values detects damaged files (since format 2). Modules trained with the soft prompt, such as a task head, are in tensors
`modules_to_save.<path>.<name>` (since format 3).
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softkv.hf.learned import IN_BASE, check_learned, learned_in, put_learned
from softkv.hf.model import PromptedModel
from softkv.hf.sharded import gathered, load_whole
from softkv.hf.task_heads import modules_of
from softkv.hf.task_rows import answers_of
from softkv.io import foreign, peft, state
from softkv.io.config import CONFIG, MODULES, SHAPE, WEIGHTS, check_size, check_sum, of_header, parse
from softkv.io.description import configuration, sizes
from softkv.io.flat import FLAT, unflatten
from softkv.io.older import with_narrow_values
from softkv.io.peft_pairs import of_decoder
from softkv.io.safe_files import check_values, checksum, read_tensors
from softkv.methods import METHODS, PTuningV2
from softkv.methods.base import BaseShape, FrozenModel, Method, SoftPrompt
from softkv.methods.placeholder import Placeholder
from softkv.methods.sharded import whole

# Tokens may be added: no learned shape depends on their number.
_FIXED = (*(name for name in SHAPE if name != "vocab_size"), "widths")
_BY_LAYER = "of each layer's own"
_SIZES = ("encoder_size", "reparametrize_size")
_MOST_SLOTS = 1 << 16  # of an encoder, whose tensors don't determine their number
_ABANDONED = 3600.0  # seconds after which a temporary file can't belong to a running save
_writing = threading.Lock()  # both files of a folder come from the same save
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save(
    model: PromptedModel,
    directory: str | os.PathLike[str],
    *,
    folded: bool = True,
    format: Literal["softkv", "peft"] = "softkv",
    is_main_process: bool = True,
) -> None:
    """Write a soft prompt to `directory`, replacing an older one atomically.

    Args:
        model: the model with the soft prompt.
        directory: created if it doesn't exist.
        folded: save only what inference needs: reparametrisations and the prompt encoder of P-tuning are replaced by
            their output. False keeps them for further training.
        format: "softkv", or "peft": `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads with the
            same logits (docs/interop.md).
        is_main_process: whether this process writes. If parameters are sharded, all processes must call.

    Raises:
        ValueError: if a learned parameter is NaN or infinite, or PEFT can't express the adapter. An older adapter is
            left unchanged.
    """
    if format not in ("softkv", "peft"):
        raise ValueError(f"save_pretrained expects format 'softkv' or 'peft', got {format!r:.300}")
    if format == "peft":
        _save_for_peft(model, Path(directory), folded, is_main_process)
        return
    config, tensors = describe(model, folded=folded)
    if not is_main_process:
        return
    check_values(tensors, "the soft prompt")
    metadata = header(config, tensors)
    check_size(metadata["softkv_config"], "the soft prompt's config")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _writing:
        _replace(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
        _replace(directory / CONFIG, lambda path: path.write_text(metadata["softkv_config"] + "\n", encoding="utf-8"))


def header(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of the safetensors file."""
    text = json.dumps(config, indent=2, sort_keys=True)
    return {"softkv_config": text, "softkv_sha256": checksum(text, tensors)}


def _save_for_peft(model: PromptedModel, directory: Path, folded: bool, is_main_process: bool) -> None:
    if not folded:
        raise ValueError("PEFT can't express folded=False: its files contain the output of networks, not the networks")
    if learned_in(model.base):
        raise ValueError(
            "PEFT can't express a soft prompt together with trained parameters of the base (LoRA): use format='softkv'"
        )
    config, tensors = peft.describe(model)
    if not is_main_process:
        return
    check_values(tensors, "the soft prompt")
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    with _writing:
        if (directory / peft.CONFIG).exists() and not peft.has_same_meaning(directory, config):
            raise ValueError(
                f"{directory} holds another kind or size of PEFT adapter, whose two files can't be replaced at once: "
                f"choose an empty folder, or delete its {peft.CONFIG}"
            )
        # The weights mean the same under the old and the new config, so a killed save leaves no mixture.
        _replace(directory / peft.WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        _replace(directory / peft.CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def saved(
    model: Any, config: dict[str, Any], tensors: dict[str, Tensor], *, encoder: nn.Module | None = None
) -> Method:
    """A method that builds a soft prompt with saved values, for a model with the same base."""
    _check_type(config["base"], model)
    return Saved(_method(config, encoder), config, tensors)


def restore(model: PromptedModel, directory: str | os.PathLike[str]) -> None:
    """Load the values of a checkpoint into a soft prompt of the same method on the same base.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if the files are damaged, or belong to another method, other settings or another base. Nothing is
            changed then.
    """
    config, tensors = read(Path(directory))
    mine, _ = describe(model, folded=False)
    for key in ("method", "config", MODULES):
        if config.get(key, []) != mine.get(key, []):
            raise ValueError(f"{directory} holds {key} {config.get(key)}, expected {mine.get(key)}")
    _check_type(config["base"], model.base)
    _check_base(config["base"], model.base_shape)
    prompt, in_base = parted(tensors)
    prompt, modules = split(prompt)
    prompt = with_narrow_values(config, prompt, model.base_shape)
    check_learned(model.base, in_base)
    _check_shapes(model.soft.state_dict(), prompt)
    if (saved := modules_of(model, model.active_adapter)) is not None:
        saved.put(modules)
    put(model.soft, prompt)
    put_learned(model.base, in_base)


def describe(model: PromptedModel, *, folded: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors that `save` writes.

    Raises:
        ValueError: if the method is not registered.
    """
    soft = gathered(model.soft)
    kept = soft.folded() if folded else soft
    config = configuration(model, model.active_adapter, folded=folded or not soft.foldable)
    tensors = dict(kept.state_dict())
    if (saved := modules_of(model, model.active_adapter)) is not None:
        tensors |= {f"{MODULES}.{name}": whole(each) for name, each in saved.tensors().items()}
    tensors |= {IN_BASE + name: whole(each) for name, each in learned_in(model.base).items()}
    return config, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the soft prompt, and those of modules saved with it, by their paths in the base."""
    head = f"{MODULES}."
    soft = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
    return soft, {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a soft prompt, and those of its base, by their names there."""
    in_base = {name.removeprefix(IN_BASE): each for name, each in tensors.items() if name.startswith(IN_BASE)}
    return {name: each for name, each in tensors.items() if not name.startswith(IN_BASE)}, in_base


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of an adapter, checked for damage; nothing is unpickled.

    Args:
        directory: a folder with softkv's or PEFT's files, or a file for `softkv.io.foreign`.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if the files are damaged or of a newer version.
    """
    if directory.is_file():
        if directory.suffix in _PICKLES:
            raise ValueError(f"{directory} is a pickle, which softkv never reads: docs/interop.md has a converter")
        return foreign.read(directory)
    path = directory / WEIGHTS
    if not path.is_file() and peft.is_adapter(directory):
        return peft.read(directory)
    if not path.is_file() and (directory / state.FILE).is_file():
        text, tensors = state.read(directory / state.FILE)
        return parse(text, directory / state.FILE), tensors
    if not path.is_file():
        pickles = sorted(file.name for file in directory.glob("*") if file.suffix in _PICKLES)
        hint = f"; {pickles[0]} is a pickle, which softkv never reads: convert it to safetensors" if pickles else ""
        if inside := peft.named_inside(directory):
            hint += f"; PEFT saves adapters in folders by name: {', '.join(inside)} (pass one of these)"
        raise FileNotFoundError(f"{directory} contains no soft prompt: expected {WEIGHTS} and {CONFIG}{hint}")
    metadata, tensors = read_tensors(path)
    config = of_header(metadata, path)
    check_sum(config, metadata, checksum(metadata["softkv_config"], tensors), path)
    return config, tensors


def read_for_shared_base(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Like `read`, for an adapter added to a base that others share.

    Raises:
        ValueError: also if it was trained together with parameters of the base.
    """
    config, tensors = read(directory)
    if parted(tensors)[1]:
        raise ValueError(
            f"{directory} contains LoRA or trained parameters of the base, which all adapters "
            "would share: load it alone, with softkv.load(base, folder)"
        )
    return config, tensors


def put(soft: SoftPrompt, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into a soft prompt, all or none.

    Raises:
        ValueError: if names or shapes don't match.
    """
    _check_shapes(soft.state_dict(), tensors)
    load_whole(soft, tensors)


class Saved(Method):
    """A method whose module is built with saved values, after checking that the base is the right one."""

    def __init__(self, method: Method, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.method, self.config, self.template = method, config, method.template
        self.tensors, self.modules = split(tensors)
        self.modules_to_save: list[str] = config.get(MODULES, [])
        self.is_peft = str(config.get("format")).startswith("PEFT")

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        _check_base(self.config["base"], base.shape)
        if FLAT in self.tensors:
            shape = base.shape
            if shape.widths or shape.value_dim != shape.head_dim:
                wide = "differ by layer" if shape.widths else f"are {shape.head_dim} and {shape.value_dim} wide"
                raise ValueError(
                    f"a flat prefix holds keys and values of one width, this model's {wide}: it was trained on another "
                    "base model"
                )
            k, v = unflatten(self.tensors[FLAT], shape.layers, shape.kv_heads, shape.head_dim)
            self.tensors = {"k": k, "v": v}
        if self.is_peft:
            self.tensors = of_decoder(self.method, self.tensors, base.shape.layers)
            if base.shape.reads and "k" in self.tensors:  # in PEFT's cache, layers read the slots too of others
                self.tensors = {name: of[list(base.shape.reads)] for name, of in self.tensors.items()}
        self.tensors = with_narrow_values(self.config, self.tensors, base.shape)
        placeholder, folded = Placeholder(base.shape), self.config["folded"]
        encodes_rows = getattr(self.method, "encoder", None) and isinstance(self.method, PTuningV2)
        # An untrusted config may ask for more values than the tensors have, or than fit in memory.
        if encodes_rows or not folded:
            self._check_sizes(_MOST_SLOTS if encodes_rows else None)
        else:
            try:
                with torch.device("meta"):
                    expected = self.method.build(placeholder, folded=True).state_dict()
            except (RuntimeError, TypeError, OverflowError) as error:
                raise ValueError(f"the adapter's config can't be built: {error}") from error
            _check_shapes(expected, self.tensors)
        soft = self.method.build(placeholder, folded=folded)
        put(soft, self.tensors)
        return soft

    def _check_sizes(self, most_slots: int | None) -> None:
        """Raise if the tensors can't be those of the network in the config."""
        total = sum(tensor.numel() for tensor in self.tensors.values())
        sizes = {name: getattr(self.method, name, None) or 0 for name in ("length", *_SIZES)}
        if sizes["length"] > (most_slots or total) or any(sizes[name] ** 2 > total for name in _SIZES):
            raise ValueError(f"the adapter's tensors don't fit its config: {total:,} values for {sizes}")


def _check_type(saved: dict[str, Any], model: Any) -> None:
    trained_on, here = saved.get("model_type"), getattr(getattr(model, "config", None), "model_type", None)
    if here is not None and trained_on is not None and trained_on != here:
        raise ValueError(f"this soft prompt was trained on another base model: {trained_on}, not {here}")
    if here is not None and "answers" in saved and (answers := answers_of(model)) not in (saved["answers"], "other"):
        raise ValueError(
            f"this soft prompt was trained on a base with one answer per {saved['answers']}, and "
            f"{type(model).__name__} gives one per {answers}"
        )


def _check_base(saved: dict[str, Any], shape: BaseShape) -> None:
    """Raise where the base is another one than what is known of the one it was trained on."""
    here = sizes(shape)
    differing = [
        f"{name} {saved[name] or _BY_LAYER} (this model: {here.get(name) or _BY_LAYER})"
        for name in _FIXED
        if name in saved and saved[name] != here.get(name)
    ]
    if differing:
        raise ValueError(f"this soft prompt was trained on another base model: {', '.join(differing)}")


def _check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless names and shapes are the expected ones."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"the adapter's tensors don't fit its config: missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"the adapter's tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}: it does not fit its config or this base model"
            )


def _method(config: dict[str, Any], encoder: nn.Module | None) -> Method:
    """The method of a parsed config."""
    name, settings = config["method"], config["config"]
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: this softkv knows {', '.join(METHODS)}")
    unknown = sorted(settings.keys() - {field.name for field in fields(METHODS[name])})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown settings of {name}: {', '.join(unknown)}")
    try:
        method = METHODS[name](**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the adapter's config is not one of {name}: {error}") from error
    if encoder is None:
        return method
    if settings.get("encoder") != "custom":
        raise ValueError("an encoder was given, but the adapter was not trained with a custom encoder")
    return replace(method, encoder=encoder)  # type: ignore[type-var]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # left by killed saves
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # from the umask; safetensors makes its files private
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
