"""Reads PEFT checkpoints, and writes adapters that PEFT can express. peft itself is not needed.

`adapter_config.json` contains the type, `adapter_model.safetensors` the `prompt_embeddings` that PEFT computes from the
trained parameters (projections, prompt encoders), and modules that were trained too, such as a head:
`base_model.<path>.<name>`.

- PREFIX_TUNING, CARTRIDGE: a flat prefix `[P, 2·L·G·D]` (`softkv.io.flat`), keys as attention sees them. Sliding
  windows and relative position biases count its slots. Layers that read keys and values of an earlier one read its
  slots too. In encoder-decoders: `softkv.io.peft_pairs`.
- PROMPT_TUNING, P_TUNING, CPT: embeddings `[P, C]`, in front of every row. Those of CPT are the context's embeddings
  plus their bounded change. In encoder-decoders they come before the encoder's input; a second half `[2·P, C]`, for the
  decoder, is not used by PEFT either.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from softkv.hf.model import PromptedModel
from softkv.hf.sharded import gathered
from softkv.hf.task_heads import SavedModules
from softkv.io.config import MODULES
from softkv.io.flat import flatten, unflatten
from softkv.io.peft_pairs import DECODER, in_pairs, of_layers
from softkv.io.safe_files import read_tensors
from softkv.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2
from softkv.methods.base import BaseShape, Method
from softkv.methods.where import where_of
from softkv.prefix import Prefix

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"
PREFIXES, PROMPTS = ("PREFIX_TUNING", "CARTRIDGE"), ("PROMPT_TUNING", "P_TUNING", "CPT")
_OTHERS = {  # types that are not a soft prompt in front of every row, and why
    "MULTITASK_PROMPT_TUNING": "its prompt depends on the task id of each row",
    "ADAPTION_PROMPT": "it adds a gated attention to the one of each layer",
    "XLORA": "it mixes LoRA adapters by each row's own weights",
    "POLY": "it mixes low-rank adapters by the task id of each row",
}
_INSIDE = "base_model."  # before the paths of modules
_TASKS = {
    "next token": "CAUSAL_LM",
    "target": "SEQ_2_SEQ_LM",
    "row": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}
_LARGEST_CONFIG = 1 << 22  # bytes: parsed JSON may take twenty times as much memory


def is_adapter(directory: Path) -> bool:
    """Whether a folder contains a PEFT adapter of any type."""
    return (directory / CONFIG).is_file()


def named_inside(directory: Path) -> list[str]:
    """Folders of PEFT adapters inside a folder, where PEFT saves all adapters except "default"."""
    return sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))[:5]


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a PEFT checkpoint, as returned by `softkv.io.checkpoint.read`.

    Raises:
        FileNotFoundError: if the weights are missing, or are a pickle.
        ValueError: if the files are damaged, or of a type that softkv does not read.
    """
    config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    check_kind(config, str(directory / CONFIG))
    if not path.is_file():
        hint = f": found no {WEIGHTS}"
        if (directory / PICKLE).is_file():
            hint = (
                f": {PICKLE} is a pickle, which softkv never reads. If you trust it, convert it: load it with PEFT "
                "and call save_pretrained(folder), which writes safetensors"
            )
        raise FileNotFoundError(f"{directory} contains the config of a PEFT adapter without its weights{hint}")
    _, tensors = read_tensors(path)
    if TENSOR not in tensors:
        raise ValueError(f"{path} expects a tensor {TENSOR!r}, got {', '.join(sorted(tensors)) or 'none'}")
    embeddings = tensors.pop(TENSOR)
    if others := sorted(name for name in tensors if not name.startswith(_INSIDE)):
        raise ValueError(f"{path} contains more than a soft prompt and modules saved with it: {', '.join(others)}")
    modules = {name.removeprefix(_INSIDE): tensor for name, tensor in tensors.items()}
    return translate(config, embeddings, str(directory), modules)


def translate(
    config: dict[str, Any], embeddings: Tensor, where: str, modules: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a PEFT config, its prompt embeddings and the tensors of its `modules_to_save`, by their paths in the
    base, to softkv's config and tensors.

    Raises:
        ValueError: if softkv does not read this type, or config and tensors don't match.
    """
    check_kind(config, where)
    kind, slots = config["peft_type"], _size(config, "num_virtual_tokens", where)
    two_stacks = config.get("task_type") == _TASKS["target"]
    rows = slots * (_halves(config) if kind in PROMPTS else 1)
    if embeddings.dim() != 2 or len(embeddings) != rows:
        raise ValueError(
            f"{where}: {TENSOR} has shape {tuple(embeddings.shape)}, expected {rows} rows (num_virtual_tokens)"
        )
    base: dict[str, Any] = {"name": config.get("base_model_name_or_path") or ""}
    if answers := [answers for answers, task in _TASKS.items() if task == config.get("task_type")]:
        base["answers"] = answers[0]
    method: Method
    if kind in PREFIXES:
        layers, heads, width = (_size(config, key, where) for key in ("num_layers", "num_attention_heads", "token_dim"))
        if width % heads:
            raise ValueError(f"{where}: token_dim {width} is not a multiple of num_attention_heads {heads}")
        base |= {"kv_heads": heads, "head_dim": width // heads, "value_dim": width // heads}
        base |= {} if two_stacks else {"layers": layers}
        method = PTuningV2(length=slots, window_covers=True, where=DECODER if two_stacks else None)
        k, v = unflatten(embeddings, layers, heads, width // heads)
        k, v = (of_layers(k), of_layers(v)) if two_stacks else (k, v)
        tensors = {"k": k, "v": v}
    else:
        base |= {"embedding_size": embeddings.shape[1]}
        method = PromptTuning(length=slots, position="before")
        tensors = {"embeddings": embeddings[:slots].contiguous()}
    settings = asdict(method)
    name = "p-tuning-v2" if kind in PREFIXES else "prompt-tuning"
    found = {"format": f"PEFT {kind}", "method": name, "config": settings, "folded": True, "base": base}
    if modules:
        found[MODULES] = sorted({_module_of(path, config, where) for path in modules})
        tensors |= {f"{MODULES}.{path}": tensor for path, tensor in modules.items()}
    return found, tensors


def _module_of(path: str, config: dict[str, Any], where: str) -> str:
    """The path of the module that a tensor belongs to: the shortest that ends with a name in `modules_to_save`."""
    names = config.get(MODULES) or []
    parts = path.split(".")
    for end in range(1, len(parts)):
        if any(isinstance(name, str) and ".".join(parts[:end]).endswith(name) for name in names):
            return ".".join(parts[:end])
    raise ValueError(f"{where} contains the weight {path!r}, which belongs to none of its modules_to_save ({names})")


def has_same_meaning(directory: Path, config: dict[str, Any]) -> bool:
    """Whether weights have the same meaning under the config of a folder as under another config."""
    try:
        there = _read_config(directory / CONFIG)
        check_kind(there, str(directory))
    except ValueError:
        return False
    alike = PREFIXES if config["peft_type"] in PREFIXES else PROMPTS
    sizes = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")
    return there["peft_type"] in alike and all(there.get(key) == config[key] for key in sizes if key in config)


def describe(model: PromptedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a soft prompt, and the head trained with it, to a PEFT config and tensors with which PEFT gives the same
    logits.

    Raises:
        ValueError: if PEFT can't express it.
    """
    method, shape, soft = model.method, model.base_shape, gathered(model.soft).folded()
    common: dict[str, Any] = {
        "base_model_name_or_path": model.config.name_or_path or None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "task_type": _task(model),
    }
    if type(method) is PromptTuning and method.position == "before":
        check_scale(model)
        embeddings = soft.soft_tokens()
        assert embeddings is not None
        kind = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": shape.embedding_size}
    elif type(method) in (PrefixTuning, PTuningV2) and not soft.encodes_rows:
        prefix = soft.prefix()
        assert prefix is not None
        config = model.config.get_text_config()
        if shape.widths:
            raise ValueError(
                "PEFT can't express this adapter: its prefix has the same heads and widths in every layer, and this "
                "model's layers differ"
            )
        if shape.value_dim != shape.head_dim or getattr(config, "kv_lora_rank", None):
            raise ValueError(
                "PEFT can't express this adapter: it puts keys and values of one width into the cache, this model's "
                f"are {shape.head_dim} and {shape.value_dim} wide, or compressed there (multi-head latent attention)"
            )
        if model.answers == "target":
            _check_decoder(model, prefix)
        elif shape.layers != config.num_hidden_layers:
            raise ValueError(
                f"PEFT can't express this adapter: it puts a prefix into each of {config.num_hidden_layers} layers, "
                f"this model has attention in {shape.layers}"
            )
        if not _reads_alike(prefix, shape):
            raise ValueError(
                "PEFT can't express this adapter: layers that read keys and values of an earlier one have slots of "
                "their own, and in PEFT's cache they read the slots of that one"
            )
        if _has_windows(config) and not prefix.window_covers:
            raise ValueError(
                "PEFT can't express this adapter: its slots stay visible to every token, but PEFT's leave the sliding "
                "windows or chunks of this model (window_covers=True is what it can say)"
            )
        count = shape.layers
        if model.answers == "target":
            prefix = in_pairs(prefix, count)
            count = len(prefix.k)
            common["num_transformer_submodules"] = 2
        embeddings = flatten(prefix, count)
        kind = {
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": shape.kv_heads * shape.head_dim,
            "num_attention_heads": shape.kv_heads,
            "num_layers": count,
        }
    else:
        raise ValueError(f"PEFT can't express this adapter: {_reason(method)}")
    tensors = {TENSOR: embeddings}
    if model.active_adapter in model.modules_to_save:
        saved = cast(SavedModules, model.modules_to_save[model.active_adapter])
        common[MODULES] = list(saved.paths)
        tensors |= {f"{_INSIDE}{path}": tensor for path, tensor in saved.tensors().items()}
    config = {**common, **kind, "num_virtual_tokens": len(embeddings)}
    return config, {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def _reads_alike(prefix: Prefix, shape: BaseShape) -> bool:
    """Whether layers have the slots of those whose keys and values they read."""
    of_layers = prefix.layers(shape.layers)
    return all(
        torch.equal(own, read)
        for layer, number in enumerate(shape.reads)
        for own, read in zip(of_layers[layer], of_layers[number], strict=True)
    )


def check_scale(model: Any) -> None:
    """Raise if PEFT would embed an encoder's input differently from the encoder itself."""
    if getattr(model, "embed_scale", 1.0) != 1.0:
        raise ValueError(
            f"PEFT's prompts for {type(model.base).__name__} don't mean the same here: it ignores that the encoder "
            f"multiplies the embeddings of tokens by {model.embed_scale:g}"
        )


def _check_decoder(model: Any, prefix: Prefix) -> None:
    """Raise if PEFT can't express a prefix of an encoder-decoder."""
    where = where_of(model.method)
    if where != DECODER:
        raise ValueError(
            "PEFT can't express this adapter: in encoder-decoders its prefix acts in the decoder's self-attention "
            f"only (where={DECODER}), this one's in {where}"
        )
    if model.counts_positions("decoder") and not prefix.window_covers:
        raise ValueError(
            "PEFT can't express this adapter: its slots have position biases, these have none "
            "(train with window_covers=True)"
        )


def _task(model: PromptedModel) -> str:
    answers = model.answers
    if answers == "token" and model.base.get_output_embeddings() is not None:
        raise ValueError("PEFT can't express this adapter: it has no task for masked language models")
    if answers not in _TASKS:
        raise ValueError(f"PEFT can't express this adapter: it has no task for a {type(model.base).__name__}")
    return _TASKS[answers]


def _reason(method: Method) -> str:
    if isinstance(method, PromptTuning):
        return "its virtual tokens come before the input, these after the prompt"
    if isinstance(method, PTuning):
        return (
            "its virtual tokens come before the input, a template's inside it; if all of them come first, "
            "softkv.bake makes a prefix from them, which PEFT can express"
        )
    if isinstance(method, PTuningV2):
        return "its prefix is the same for every row, an encoder computes one from each row's prompt"
    return f"it has nothing like {type(method).__name__}"


def _has_windows(config: Any) -> bool:
    """Whether some layer of a model has a sliding window, or attends in chunks."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    sliding = getattr(config, "sliding_window", None) is not None and any("sliding" in kind for kind in kinds)
    return sliding or any("chunked" in kind for kind in kinds)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected a config of at most {_LARGEST_CONFIG:,}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} expects a JSON object, got {type(config).__name__}")
    return config


def check_kind(config: dict[str, Any], where: str) -> None:
    """Raise unless softkv reads the type of a PEFT config."""
    kind, task, halves = (config.get(key) for key in ("peft_type", "task_type", "num_transformer_submodules"))
    if kind not in (*PREFIXES, *PROMPTS):
        why = f" ({_OTHERS[kind]})" if isinstance(kind, str) and kind in _OTHERS else ""
        raise ValueError(
            f"{where} is of a {reprlib.repr(kind)} adapter{why}: softkv reads {', '.join((*PREFIXES, *PROMPTS))} from "
            "PEFT"
        )
    if task not in (None, *_TASKS.values()) or halves not in ((None, 1, 2) if task == _TASKS["target"] else (None, 1)):
        raise ValueError(
            f"{where} is of the task {reprlib.repr(task)} (with {reprlib.repr(halves)} transformer submodules): softkv "
            f"reads the tasks {', '.join(_TASKS.values())}, with 1 (SEQ_2_SEQ_LM: 2)"
        )
    if task == _TASKS["target"] and (kind == "CPT" or (kind in PREFIXES and _halves(config) == 1)):
        raise ValueError(
            f"{where}: softkv reads {'no CPT' if kind == 'CPT' else 'prefixes with num_transformer_submodules=2 only'} "
            "of encoder-decoders, as PEFT itself does not support others"
        )
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where}: base_model_name_or_path expects a text, got {reprlib.repr(name)}")


def _halves(config: dict[str, Any]) -> int:
    """The number of stacks for which PEFT stores a prompt."""
    return config.get("num_transformer_submodules") or (2 if config.get("task_type") == _TASKS["target"] else 1)


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} expects a whole number of at least 1, got {reprlib.repr(value)}")
    return value
