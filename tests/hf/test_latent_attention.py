"""Attention whose keys and values have different widths (multi-head latent attention), or that runs twice in a block
(DiffLlama): a text as K/V is that text in context."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.hf import latent
from tests.hf.naive import close
from tests.hf.tiny import METHODS, TEXT, tokenizer

MODELS: dict[str, dict[str, Any]] = latent.MODELS | {"DiffLlama": latent.SIZES | {"num_key_value_heads": 2}}


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
