"""PEFT's counterpart of a softkv method, on the same frozen model."""

from __future__ import annotations

from typing import Any

CONFIGS = {
    "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
}


def in_peft(model: Any, name: str, length: int, encoder_size: int) -> Any:
    """The model with PEFT's method `name` and `length` virtual tokens, in training mode; `encoder_size` is the hidden
    size of P-tuning's LSTM."""
    import peft

    encoder = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": encoder_size}
    options = encoder if name == "P_TUNING" else {}
    config = getattr(peft, CONFIGS[name])(task_type="CAUSAL_LM", num_virtual_tokens=length, **options)
    return peft.get_peft_model(model, config).train()


def without_soft_tokens(example: dict[str, list[int]]) -> dict[str, list[int]]:
    """An encoded row without the template's soft tokens, which PEFT puts before the row itself."""
    real = [token >= 0 for token in example["input_ids"]]
    return {key: [x for x, keep in zip(value, real, strict=True) if keep] for key, value in example.items()}


def rows_of_matrices(k: Any, v: Any) -> Any:
    """Matrices `[L, 1, G, P, D]` as PEFT's prefix tuning holds them: `[P, L·2·G·D]`, K before V in each layer."""
    import torch

    return torch.stack([k, v], 1).flatten(0, 2).permute(2, 0, 1, 3).flatten(1)
