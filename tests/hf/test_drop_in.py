"""`attn_implementation="softkv"` alone, with no soft prompt: eager's answers on every architecture."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import softkv.hf.attention
from tests.hf.continuations import batch_of
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, packed, rows_for
from tests.hf.tiny import NAMES, model_of

ROWS = rows_for("no soft tokens")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_eager(name: str, layout: str) -> None:
    if "packed" in layout and name.startswith("Bart"):
        pytest.skip("the bare model places packed rows by their columns")
    batch, parts = LAYOUTS[layout](ROWS)
    # Eager is no truth on packed rows: OPT's lets them see each other.
    truth = LAYOUTS["right-padded"](ROWS) if "packed" in layout else (batch, parts)
    if "cu_seq_lens_q" in batch:
        batch["position_ids"] = packed(ROWS, lengths=False)[0]["position_ids"]
    outputs = []
    for attention, (inputs, split) in (("softkv", (batch, parts)), ("eager", truth)):
        model = model_of(name, attention)
        output = model(**inputs, use_cache=False)
        output.loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        outputs.append([*split(output.logits), output.loss, gradient])
    for got, want in zip(*outputs, strict=True):
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_generates_as_eager(name: str) -> None:
    batch = batch_of([row.ids[: row.prompt] for row in ROWS], "left")
    got, want = model_of(name, "softkv"), model_of(name)
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        both = [model.generate(**batch, max_new_tokens=9, **options) for model in (got, want)]
        assert torch.equal(*both), options


def test_static_cache_in_steps() -> None:
    """A part-filled buffer: more queries than one, fewer keys than the buffer holds."""
    for name in NAMES:
        model, eager = model_of(name, "softkv"), model_of(name)
        ids = torch.randint(2, 60, (2, 11))
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            got = [model(part, past_key_values=cache).logits for part in ids.split([4, 1, 3, 2, 1], 1)]
            close(torch.cat(got, 1), eager(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_matrix_masks(dtype: torch.dtype) -> None:
    """A mask of four axes is what each query sees: neither causal nor padding, here."""
    ids = torch.randint(2, 60, (2, 7))
    sees = torch.rand(2, 1, 7, 7) < 0.5
    sees |= torch.eye(7, dtype=torch.bool)
    mask = sees if dtype == torch.bool else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(dtype).min)
    for name in ("Llama", "Gemma2: softcap, alternating windows"):
        gradients = []
        for attention, given in (("softkv", mask), ("eager", torch.zeros(sees.shape).masked_fill(~sees, -1e30))):
            model = model_of(name, attention)
            logits = model(ids, attention_mask=given, use_cache=False).logits
            logits.square().sum().backward()
            gradients.append((logits, model.get_input_embeddings().weight.grad))
        for got, want in zip(*gradients, strict=True):
            close(got, want)


def test_sinks() -> None:
    """gpt-oss: a learned logit a head in the denominator, on windowed layers too."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    ids = torch.randint(2, 60, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits = []
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sinks.normal_()
        for attention in ("softkv", "eager"):
            model.set_attn_implementation(attention)
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    close(*logits)


def test_refusals() -> None:
    model, ids = model_of("Llama", "softkv"), torch.ones(1, 4).long()
    with pytest.raises(ValueError, match="never forms attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="mask of 2 or 4 axes"):
        softkv.hf.attention.attention(
            model.model.layers[0].self_attn, *torch.zeros(3, 1, 2, 4, 8), torch.zeros(1, 4, 4)
        )
    model = model_of("Llama", "softkv", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="has no dropout"):
        model(ids)


def test_transformers_imports_beside_a_folder_called_kernels() -> None:
    root = Path(__file__).parents[2]
    assert (root / "kernels").is_dir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf.imports"], cwd=root, capture_output=True, text=True, check=False
    )
    assert "imported" in done.stdout, done.stderr


def test_keywords_of_callers_pass_and_those_of_models_do_not() -> None:
    model, ids = model_of("Llama", "softkv"), torch.tensor([[5, 6, 7]])
    of_callers = {"foo": 1, "ignore_index": -100, "shift_labels": ids, "return_token_accuracy": True}
    assert torch.equal(model(ids, **of_callers).logits, model(ids).logits)
    with pytest.raises(ValueError, match="passes apply_rotary_pos_emb to its attention, which softkv does not"):
        model(ids, apply_rotary_pos_emb=1)  # a name that the model's own code knows
