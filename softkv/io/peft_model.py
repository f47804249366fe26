"""Conversion of a `peft.PeftModel` in memory to a `SoftModel`."""

from __future__ import annotations

from typing import Any

import torch

from softkv.evaluation import in_evaluation
from softkv.io import peft
from softkv.io.attach import assemble
from softkv.io.config import MODULES
from softkv.io.soft_model import SoftModel


@torch.no_grad()
def from_peft(peft_model: Any, *, adapter_name: str | None = None, backend: str | None = None) -> SoftModel:
    """Attach the soft prompt of a `peft.PeftModel` to its base model, with the same logits.

    Args:
        peft_model: a model with a PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING or CPT adapter, a causal
            LM or a model with a task head. It is unchanged, except that both share the base, which is frozen and uses
            softkv's attention until `detach`.
        adapter_name: the adapter to use; None: the active one.
        backend: as in `softkv.prefix_attention`; None chooses by device.

    Returns:
        A `SoftModel` in evaluation mode. Prefixes become `PTuningV2`, prompts `PromptTuning` before the input; networks
        through which PEFT trains them are replaced by their output.

    Raises:
        ValueError: if the adapter is of another type, or there is none of that name.
        TypeError: if the model is not a `PeftModel`.

    Example:
        >>> config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        >>> softkv.from_peft(peft.get_peft_model(base, config)).method.length
        4
    """
    if not hasattr(peft_model, "peft_config") or not hasattr(peft_model, "get_base_model"):
        raise TypeError(f"softkv.from_peft expects a peft.PeftModel, got {type(peft_model).__name__}")
    name = adapter_name if adapter_name is not None else peft_model.active_adapter
    if name not in peft_model.peft_config:
        raise ValueError(f"this PeftModel has the adapters {', '.join(peft_model.peft_config)}, no {name!r}")
    config = {key: getattr(value, "value", value) for key, value in peft_model.peft_config[name].to_dict().items()}
    where = f"the adapter {name!r}"
    peft.check_kind(config, where)
    encoder = peft_model.prompt_encoder[name]
    if config["inference_mode"]:
        embeddings = encoder.embedding.weight
    else:
        embeddings = in_evaluation(peft_model).get_prompt_embedding_to_save(name)
    base = peft_model.get_base_model()
    modules = {
        f"{path}.{key}": value.detach().cpu()
        for path, module in base.named_modules()
        if name in getattr(module, MODULES, ())
        for key, value in getattr(module, MODULES)[name].state_dict().items()
    }
    described, tensors = peft.translate(config, embeddings.detach().cpu(), where, modules)
    return assemble(base, described, tensors, backend=backend)
