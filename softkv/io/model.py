"""`attach` and `load`: a soft prompt on a frozen transformers model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softkv.hf.frozen import holders_of, take_off_others
from softkv.hf.learned import check_learned, inject, put_learned
from softkv.hf.pipelines import say_known
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
    """Attaches a soft prompt to a transformers model and freezes the model.

    Args:
        model: a causal LM, an encoder, an encoder-decoder, or a model with a task head. A model whose attention does
            not go through transformers' attention interface (BLOOM, Falcon, MPT, GPT-J...) keeps its own: a prefix
            then stands in its past, where it can; `docs/models.md` lists who takes what.
        method: `PromptTuning`, `PTuning`, `PrefixTuning` or `PTuningV2`.
        tokenizer: the model's tokenizer, needed for inits from a text.
        backend: of `softkv.prefix_attention`; None chooses by device.
        head_once: run soft tokens that stand before every row once for the batch. False puts them into
            every row of a forward with `use_cache=False`: the same results, slower (to measure by how much).
        modules_to_save: names of modules to train and save with the soft prompt. None: the head that a task class
            adds (`AutoModelForSequenceClassification`...); () none. Each adapter trains its own fp32 copies; the model
            keeps its modules.

    Returns:
        A `SoftModel`; its only trainable parameters are the method's and those of `modules_to_save`, in fp32.

    Raises:
        ValueError: when the method needs attention that softkv can't reach, or the model's layers don't fit the method
            (an encoder of prompts in a bidirectional model).

    Example:
        >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
        >>> sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        ['adapters.default.k', 'adapters.default.v']
    """
    held = holders_of(model)
    try:  # not a context manager: an interrupt may come between its end and the return
        return _class_for(model)(
            model, method, tokenizer=tokenizer, backend=backend, head_once=head_once, modules_to_save=modules_to_save
        )
    except BaseException:
        take_off_others(model, held)
        raise


say_known()


def _class_for(model: Any) -> type[SoftModel]:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return SoftModel
    from softkv.io.encoder_decoder import SoftEncoderDecoder  # which others need not wait for

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
    """Attaches a saved soft prompt to a transformers model.

    Args:
        model: the base that it was trained on.
        directory: a folder that `save_pretrained` wrote, softkv's or PEFT's, or "user/name" of one on the Hugging Face
            Hub; or a file converted from other code (docs/interop.md).
        encoder: the encoder module of a P-tuning v2 adapter that was trained with a custom one.
        backend: of `softkv.prefix_attention`; None chooses by device.
        revision, token: of a repository on the Hub.

    Returns:
        A `SoftModel` in evaluation mode.

    Raises:
        FileNotFoundError: when there is no adapter.
        ValueError: when the files are damaged, of a newer version, or of another base model. Nothing is attached then.

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
    """Puts a soft prompt that was read (`read`) or made (`describe`) on a model, in evaluation mode.

    Raises:
        ValueError: when config, tensors and model don't fit together. Nothing is attached then.
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
        take_off_others(model, held)
        if injected:
            model.delete_adapter(injected)
        raise
