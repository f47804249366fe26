"""`attn_implementation="softkv"` without a prompt where masks are not just causal: eager's answers, or one sentence."""

import copy
from typing import Any

import pytest
import torch
import transformers

import softkv.hf
from tests.hf.naive import close

TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
BART = TOKENS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}

SEQ2SEQ: dict[str, dict[str, Any]] = {
    "Bart": BART, "MBart": BART, "Pegasus": BART, "Marian": BART, "M2M100": BART,
    "T5": T5 | {"decoder_start_token_id": 1},
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama4Text": LLAMA
    | {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4},
    "Mistral": LLAMA | {"sliding_window": 5},
    "GPT2": TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96} | dict.fromkeys(
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0
    ),
}  # fmt: skip


def both(model_class: Any, config: Any) -> list[Any]:
    """A random model with softkv's attention and with eager's."""
    torch.manual_seed(0)
    eager = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    ours = model_class._from_config(copy.deepcopy(config), attn_implementation="softkv").eval()
    ours.load_state_dict(eager.state_dict())
    return [ours, eager]


def masks() -> list[Any]:
    left = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    return [None, left, left.flip(1)]


@torch.no_grad()
def test_two_rows_of_restarting_positions() -> None:
    """Packed rows in more than one line."""
    models = both(transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA))
    ids = torch.randint(2, 60, (2, 7))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    close(*[model(ids, position_ids=positions, use_cache=False).logits for model in models])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal(name: str) -> None:
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    kind = getattr(transformers, name.removesuffix("Text") + kind)
    models = both(kind, getattr(transformers, f"{name}Config")(**CAUSAL[name]))
    ids = torch.randint(2, 60, (2, 12))
    for mask in masks():
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        close(*[model(ids, attention_mask=mask).logits[real] for model in models])
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        got, want = (
            model.generate(ids, attention_mask=masks()[1], max_new_tokens=6, do_sample=False, **options)
            for model in models
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_cross_attention(name: str) -> None:
    """Encoder and decoder of different lengths; T5's position bias too."""
    kind = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    models = both(getattr(transformers, name + kind), getattr(transformers, f"{name}Config")(**SEQ2SEQ[name]))
    ids = torch.randint(3, 60, (2, 12))
    for mask in masks():
        for length in (12, 5, 1):
            close(*[model(ids, mask, decoder_input_ids=ids[:, :length]).logits for model in models])
    options = {"max_new_tokens": 6, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        got, want = (model.generate(ids, attention_mask=masks()[2], **options, **more) for model in models)
        assert torch.equal(got, want)


@torch.no_grad()
def test_cross_attention_of_a_decoder_alone() -> None:
    config = transformers.GPT2Config(**CAUSAL["GPT2"], add_cross_attention=True)
    models = both(transformers.GPT2LMHeadModel, config)
    ids, states = torch.randint(2, 60, (2, 3)), torch.randn(2, 9, 32)
    close(*[model(ids, encoder_hidden_states=states, use_cache=False).logits for model in models])


def paligemma() -> tuple[Any, dict[str, Any]]:
    text = transformers.GemmaConfig(**LLAMA, head_dim=8).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**vision, image_size=8, patch_size=4).to_dict()
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=60, projection_dim=32
    )
    ids = torch.tensor([[60] * 4 + [1, 20, 21, 22]])
    batch = {
        "input_ids": ids,
        "token_type_ids": torch.tensor([[0] * 6 + [1] * 2]),
        "pixel_values": torch.randn(1, 3, 8, 8),
        "attention_mask": torch.ones_like(ids),
    }
    return config, batch


@torch.no_grad()
def test_prefix_language_model() -> None:
    """An image and a prompt that look ahead, drop-in and under a soft prompt whose slots all of them see."""
    config, batch = paligemma()
    ours, eager = both(transformers.PaliGemmaForConditionalGeneration, config)
    want = eager(**batch).logits
    close(ours(**batch).logits, want)
    model = softkv.attach(eager, softkv.PTuningV2(length=3, init="random", init_std=1.0)).eval()
    with model.disabled():
        close(model(**batch).logits, want)
    assert not torch.allclose(model(**batch).logits, want, atol=1e-2)


# Attention of their own, or masks that they compute with.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "Bloom models do not use"),
    "XGLM": (
        {"vocab_size": 61, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4},
        "XGLM models do not use",
    ),
    "Doge": (LLAMA, "computes with its attention masks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    fields, message = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="softkv").eval()
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[5, 6, 7, 8]]))
