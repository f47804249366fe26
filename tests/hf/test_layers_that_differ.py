"""Gemma 4, whose global layers have other heads than its sliding ones: soft tokens stay in rows, K/V say why not."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.hf.naive import close, greedy, row_logits
from tests.hf.rows import LAYOUTS, rows_for
from tests.hf.tiny import METHODS, TEXT, WINDOW, tokenizer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "max_position_embeddings": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "sliding_window": WINDOW, "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "head dims": {},
    "head dims and key/value heads": {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**(SIZES | MODELS[name]))
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return base


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["prompt-tuning before", "prompt-tuning after", "p-tuning"])
@torch.no_grad()
def test_soft_tokens(name: str, method: str) -> None:
    eager, rows = model_of(name), rows_for(method)
    torch.manual_seed(1)
    model = softkv.attach(model_of(name), METHODS[method]).eval()
    soft = model.soft
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        for got, row in zip(parts(model(**batch).logits), rows, strict=True):
            close(got, row_logits(eager, soft, row))
    prompt = rows[1].ids[: rows[1].prompt]
    for options in ({}, {"cache_implementation": "static"}):
        got = model.generate(torch.tensor([prompt]), max_new_tokens=4, **options)
        assert got[0, -4:].tolist() == greedy(eager, soft, prompt, 4)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_refused(name: str) -> None:
    for method in ("prefix-tuning", "p-tuning v2", "p-tuning v2 of a text", "p-tuning v2 encoder"):
        with pytest.raises(ValueError, match="the same head dims in every attention layer"):
            softkv.attach(model_of(name), METHODS[method], tokenizer=tokenizer())
    with pytest.raises(ValueError, match="a prefix needs keys of one shape in every layer"):
        softkv.Prefix.from_text(model_of(name), tokenizer(), TEXT)
