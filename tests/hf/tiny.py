"""Tiny random models of ten architectures, and the methods to put on them."""

from typing import Any

import torch
import transformers

import softkv
from softkv.methods import PTuning
from softkv.methods.base import Method

VOCAB = 61
WINDOW = 5  # shorter than the longest rows below

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.25,  # large enough that a wrong key shows
}
_OLD = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# name (what is awkward about it) → (configuration, model)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _LLAMA_LIKE),
    "Qwen2": ("Qwen2", _LLAMA_LIKE),
    "Qwen3: q/k-norm, head_dim is not C/H": ("Qwen3", _LLAMA_LIKE | {"head_dim": 16}),
    "Mistral: a sliding window": ("Mistral", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "Gemma2: softcap, alternating windows": (
        "Gemma2",
        _LLAMA_LIKE
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Phi3: fused projections": ("Phi3", _LLAMA_LIKE),
    "GPTNeoX: parallel residual, partial rotary": (
        "GPTNeoX",
        {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"} | {"rotary_pct": 0.5},
    ),
    "OPT: learned positions, a narrow embedding": (
        "OPT",
        _OLD
        | {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "word_embed_proj_dim": 16,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.25,
        },
    ),
    "Bart: no position ids": (
        "Bart",
        _OLD
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 96,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.25,
            "forced_eos_token_id": None,
            "is_decoder": True,
            "is_encoder_decoder": False,
        },
    ),
    "GPT2: learned positions": (
        "GPT2",
        _OLD
        | {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 96,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": 0.25,
        },
    ),
}
NAMES = list(ARCHITECTURES)


def config_of(name: str, **changes: Any) -> Any:
    kind, fields = ARCHITECTURES[name]
    return getattr(transformers, f"{kind}Config")(**(fields | changes))


def model_of(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, the same for every call with the same configuration."""
    config = config_of(name, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are 0 and 1 at first: hides what reads them
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def tokenizer() -> Any:
    """Words w0, w1, ... of the tiny vocabulary, a BOS in front. Each caller's own: trainers change its padding side."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


TEXT = "w7 w8 w9 w10 w11 w12 w13"

METHODS: dict[str, Method] = {
    "prompt-tuning after": softkv.PromptTuning(length=3),
    "prompt-tuning before": softkv.PromptTuning(length=3, position="before"),
    "p-tuning": PTuning(template="[P1] [X] [P2] and [P3] [Y]", encoder_size=16),
    "prefix-tuning": softkv.PrefixTuning(length=7),
    "p-tuning v2": softkv.PTuningV2(length=7),
    "p-tuning v2 of a text": softkv.PTuningV2(init="text", init_text=TEXT),
    "p-tuning v2 encoder": softkv.PTuningV2(length=3, encoder="lstm", encoder_size=8),
}


def attach(name: str, method: str, **changes: Any) -> softkv.SoftModel:
    model = model_of(name, **changes)
    torch.manual_seed(1)
    return softkv.attach(model, METHODS[method], tokenizer=tokenizer())
