"""Sizes of well-known models, for `softkv plan` without a network: the fields of their Llama-like configs, as their
authors publish them (config.json of each on the Hugging Face Hub)."""

from __future__ import annotations

from typing import Any


def _llama(
    hidden: int, middle: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tied=True) | {"head_dim": 64},
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, tied=True) | {"head_dim": 128},
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32768),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
}
