"""PEFT's prefixes on a model whose last layers read keys and values of earlier ones (Gemma 3n): in its cache they read
the slots of these too, softkv gives them slots of their own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import softkv
from tests.hf.naive import close
from tests.hf.tiny import VOCAB, WINDOW

P = 3


def fresh() -> Any:
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=[48] * 4, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=WINDOW,
        activation_sparsity_pattern=[0.0] * 4, laurel_rank=8, max_position_embeddings=96, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def test_both_ways(tmp_path: Path) -> None:
    ids = torch.arange(20, 28)[None]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    theirs.prompt_encoder["default"].embedding.weight.normal_()
    want = theirs(input_ids=ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    mine = softkv.load(fresh(), tmp_path / "theirs")
    close(mine(ids).logits, want)
    mine.save_pretrained(tmp_path / "mine", format="peft")
    close(peft.PeftModel.from_pretrained(fresh(), tmp_path / "mine").eval()(input_ids=ids).logits, want)
    mine.soft.k[2].add_(1.0)
    assert (mine(ids).logits - want).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"PEFT can't express .* layers that read keys and values of an earlier one"):
        mine.save_pretrained(tmp_path / "none", format="peft")
