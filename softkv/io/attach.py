"""`attach` and `load`: a soft prompt on a frozen transformers model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softkv.hf.frozen import detach_others, holders_of
from softkv.hf.learned import check_learned, inject, put_learned
from softkv.hf.pipelines import suppress_unsupported_warning
from softkv.io import checkpoint, hub
from softkv.io.soft_model import SoftModel
from softkv.methods.base import Method


def attach(
    model: Any,
    method: Method,
    *,
    tokenizer: Any = None,
    backend: str | None = None,
    head_once: bool = True,
    modules_to_save: Sequence[str] | None = None,
) -> SoftModel:
    """Attach a soft prompt to a transformers model and freeze the model.

    Args:
        model: a causal LM, an encoder, an encoder-decoder, or a model with a task head. A model whose attention does
            not go through transformers' attention interface (BLOOM, Falcon, MPT, GPT-J...) keeps its own: a prefix
            then stands in its past, where it can; `docs/models.md` lists who takes what.
        method: `PromptTuning`, `PTuning`, `PrefixTuning` or `PTuningV2`.
        tokenizer: the model's tokenizer, needed to initialise from a text.
        backend: as in `softkv.prefix_attention`; None chooses by device.
        head_once: compute soft tokens before every row once per batch. False puts them into every row of a forward with
            `use_cache=False`, which gives the same results more slowly (for comparison).
        modules_to_save: names of modules to train and save with the soft prompt. None: the head added by a task class
            (`AutoModelForSequenceClassification`...); (): none. Each adapter trains its own fp32 copies; the model's
            modules are unchanged.

    Returns:
        A `SoftModel`; its only trainable parameters are the method's and those of `modules_to_save`, in fp32.

    Raises:
        ValueError: if the method needs attention that softkv can't replace, or does not support the model (a prompt
            encoder on a bidirectional model).

    Example:
        >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
        >>> sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        ['adapters.default.k', 'adapters.default.v']
    """
    held = holders_of(model)
    try:  # not a context manager, because an interrupt may come between its end and the return
        return _class_for(model)(
            model, method, tokenizer=tokenizer, backend=backend, head_once=head_once, modules_to_save=modules_to_save
        )
    except BaseException:
        detach_others(model, held)
        raise


suppress_unsupported_warning()


def _class_for(model: Any) -> type[SoftModel]:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return SoftModel
    from softkv.io.encoder_decoder import SoftEncoderDecoder  # slow to import, and not needed otherwise

    return SoftEncoderDecoder


def load(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    encoder: nn.Module | None = None,
    backend: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> SoftModel:
    """Attach a saved soft prompt to a transformers model.

    Args:
        model: the base that the soft prompt was trained on.
        directory: a folder written by `save_pretrained` of softkv or PEFT, "user/name" of one on the Hugging Face Hub,
            or a file converted from other code (docs/interop.md).
        encoder: the encoder module of a P-tuning v2 adapter trained with a custom encoder.
        backend: as in `softkv.prefix_attention`; None chooses by device.
        revision, token: of a repository on the Hub.

    Returns:
        A `SoftModel` in evaluation mode.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if the files are damaged, of a newer version, or for another base model. Nothing is attached then.

    Example:
        >>> softkv.attach(base, softkv.PTuningV2(length=4)).save_pretrained("adapter")
        >>> softkv.load(base, "adapter").method.length
        4
    """
    config, tensors = checkpoint.read(hub.local(directory, revision, token))
    name, trained_on = model.config.name_or_path, config["base"]["name"]
    if name and trained_on and Path(name).name != Path(trained_on).name:
        warnings.warn(f"this soft prompt was trained on {trained_on}, not on {name}", stacklevel=2)
    return assemble(model, config, tensors, encoder=encoder, backend=backend)


def assemble(
    model: Any,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    encoder: nn.Module | None = None,
    backend: str | None = None,
) -> SoftModel:
    """Attach a soft prompt from `read` or `describe` to a model, in evaluation mode.

    Raises:
        ValueError: if config, tensors and model don't match. Nothing is attached then.
    """
    prompt, in_base = checkpoint.parted(tensors)
    held = holders_of(model)
    injected = inject(model, config.get("peft", {}))
    try:
        method = checkpoint.saved(model, config, prompt, encoder=encoder)
        soft_model = _class_for(model)(model, method, backend=backend).eval()
        check_learned(model, in_base)
        put_learned(model, in_base)
        return soft_model
    except BaseException:
        detach_others(model, held)
        if injected:
            model.delete_adapter(injected)
        raise
