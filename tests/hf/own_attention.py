"""Tiny random models whose attention softkv can't take the place of."""

from typing import Any

import torch
import transformers

VOCAB = 61
_SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LIKE_LLAMA = _SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
_LIKE_GPTJ = _SIZES | {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 96, "n_ctx": 96, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_LIKE_FALCON = _SIZES | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
# name → (configuration, its fields)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "BLOOM: ALiBi": (
        "Bloom",
        _SIZES | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "Falcon": ("Falcon", _LIKE_FALCON),
    "Falcon: ALiBi": ("Falcon", _LIKE_FALCON | {"alibi": True, "new_decoder_architecture": False}),
    "MPT: ALiBi by columns": (
        "Mpt",
        _SIZES | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "GPT-J": ("GPTJ", _LIKE_GPTJ),
    "CodeGen": ("CodeGen", _LIKE_GPTJ),
    "StableLM": ("StableLm", _LIKE_LLAMA | {"partial_rotary_factor": 0.5}),
    "Nemotron": ("Nemotron", _LIKE_LLAMA),
    "Llama 4: chunks": (
        "Llama4Text",
        _LIKE_LLAMA
        | {"attention_chunk_size": 4, "num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48,
           "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
    ),
    "XGLM: positions from a table": (
        "XGLM",
        _SIZES
        | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "dropout": 0.0,
           "attention_dropout": 0.0, "max_position_embeddings": 96},
    ),
    "GPT Neo: windows, learned positions": (
        "GPTNeo",
        _SIZES
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
           "window_size": 5, "max_position_embeddings": 96, "attention_dropout": 0.0, "embed_dropout": 0.0,
           "resid_dropout": 0.0},
    ),
}  # fmt: skip


def config_of(kind: str) -> Any:
    name, fields = KINDS[kind]
    return getattr(transformers, f"{name}Config")(**fields)


def base_of(kind: str) -> Any:
    """The same weights for every call."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return model.eval()
