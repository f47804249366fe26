"""Attention whose keys and values have different widths (multi-head latent attention), or that runs twice in a block
(DiffLlama): a text as K/V is that text in context."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.hf.naive import close
from tests.hf.tiny import METHODS, TEXT, tokenizer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LATENT = SIZES | {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV3": LATENT | EXPERTS,
    "MiniCPM3": LATENT,
    "Youtu": LATENT,
    "DiffLlama": SIZES | {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["p-tuning v2 of a text", "prompt-tuning before"])
@torch.no_grad()
def test_text_in_context(name: str, method: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in base.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    text = tokenizer()(TEXT)["input_ids"]
    chosen = METHODS[method]
    if "prompt" in method:
        chosen = softkv.PromptTuning(length=7, position="before", init="text", init_text=TEXT)
        text = text[1:]
    rows = [[20, 21, 22, 23], [30, 31]]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = [base(torch.tensor([text + row])).logits[0, len(text) :] for row in rows]
    tokens = base.generate(torch.tensor([text + rows[0]]), **options)[0, -4:]
    model = softkv.attach(base, chosen, tokenizer=tokenizer()).eval()
    batch = softkv.PackingCollator()([{"input_ids": row, "labels": row} for row in rows])
    close(model(**batch).logits[0], torch.cat(want))
    padded = torch.tensor([rows[0], [0, 0, *rows[1]]])
    got = model(padded, attention_mask=(padded != 0).long()).logits
    close(torch.cat([got[0], got[1, 2:]]), torch.cat(want))
    assert torch.equal(model.generate(torch.tensor([rows[0]]), **options)[0, -4:], tokens)
