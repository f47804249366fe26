"""Tiny random models whose attention softkv can't replace."""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor

from softkv.prefix import Prefix

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
_LIKE_BERT = _SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "is_decoder": True,
    "max_position_embeddings": 96, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# Those whose past carries prefixes.
PAST: dict[str, tuple[str, dict[str, Any]]] = KINDS | {
    "Falcon: keys of each head": ("Falcon", _LIKE_FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "GPT-NeoX Japanese": (
        "GPTNeoXJapanese",
        _SIZES
        | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_multiple_size": 2,
           "max_position_embeddings": 96, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "RemBERT: caches of an encoder-decoder": (
        "RemBert", _LIKE_BERT | {"input_embedding_size": 16, "output_embedding_size": 24}
    ),
    "Doge: masks from values": ("Doge", _LIKE_LLAMA | {"keep_window_size": 64, "hidden_dropout": 0.0}),
}  # fmt: skip


def config_of(kind: str) -> Any:
    name, fields = PAST.get(kind) or KINDS[kind]
    return getattr(transformers, f"{name}Config")(**fields)


def base_of(kind: str) -> Any:
    """The same weights for every call."""
    torch.manual_seed(0)
    config = config_of(kind)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return model.eval()


def behind(bare: Any, prefix: Prefix | None, ids: list[int]) -> Tensor:
    """Logits `[T, V]` of a row alone in a bare model, behind a cache that holds a prefix."""
    layers = [] if prefix is None else prefix.layers(bare.config.get_text_config().num_hidden_layers)
    cache, P, T = transformers.DynamicCache(config=bare.config), 0 if prefix is None else prefix.length, len(ids)
    for layer, (k, v) in enumerate(layers):
        cache.update(k.to(bare.dtype), v.to(bare.dtype), layer)
    given = {"attention_mask": torch.ones(1, P + T).long(), "position_ids": P + torch.arange(T)[None]}
    taken = inspect.signature(bare.forward).parameters
    given = {name: value for name, value in given.items() if name in taken}
    return bare(torch.tensor([ids]), past_key_values=cache, use_cache=True, **given).logits[0]


def padded(rows: list[list[int]], side: str) -> tuple[dict[str, Tensor], list[slice]]:
    """A batch of rows, and where they lie in it."""
    width = max(map(len, rows))
    starts = [width - len(row) if side == "left" else 0 for row in rows]
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    places = [slice(start, start + len(row)) for start, row in zip(starts, rows, strict=True)]
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[at, place], mask[at, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}, places
