"""A tiny Llama, and soft prompts on it that change what it answers."""

from typing import Any

import torch
import transformers

import softkv
from softkv.methods.base import Method

VOCAB = 31
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def llama(layers: int = 1) -> Any:
    """The same random weights every time."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    return model


def attached(method: Method | None = None, base: Any = None) -> softkv.SoftModel:
    model = softkv.attach(llama() if base is None else base, method or softkv.PTuningV2(length=4)).eval()
    scatter(model)
    return model


@torch.no_grad()
def scatter(model: softkv.SoftModel, seed: int = 1) -> None:
    """Parameters far from their start, where a wrong or missing prompt shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.adapters.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
