"""Chunked attention (Llama 4): a query sees the tokens of its own chunk. Chunks are counted from a row's first token,
or from the first slot of a text, however rows are laid out and whatever a cache has dropped."""

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.methods.base import Method, SoftPrompt
from softkv.prefix import Prefix
from tests.hf.continuations import batch_of
from tests.hf.differing import behind
from tests.hf.naive import Row, close
from tests.hf.rows import LAYOUTS, assert_in_every_layout, rows_for, sum_of
from tests.hf.tiny import METHODS, TEXT, VOCAB, tokenizer

CHUNK, N, E, STEPS = 4, 6, 8, 6

KINDS: dict[str, Method] = {
    "matrices": softkv.PTuningV2(length=N, init_std=0.5),
    "matrices that chunks count": softkv.PTuningV2(length=N, init_std=0.5, window_covers=True),
    "one pair": softkv.PrefixTuning(length=3, init_std=0.5),
    "of a text": softkv.PTuningV2(init="text", init_text=TEXT),
    "an encoder": softkv.PTuningV2(length=N, init_std=0.5, encoder="lstm", encoder_size=E),
    "tokens before": METHODS["prompt-tuning before"],
    "tokens after": METHODS["prompt-tuning after"],
    "template": METHODS["p-tuning"],
}


def fresh(**changes: Any) -> Any:
    """Two layers in chunks and one that sees all, without rotation; the same weights for every call."""
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 2, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1], "initializer_range": 0.25,
        "attention_chunk_size": CHUNK, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "attn_temperature_tuning": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**(fields | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert config.layer_types == ["chunked_attention", "full_attention", "chunked_attention"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:  # which transformers leaves empty
                parameter.normal_(0, 0.25)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


_bare = cache(fresh)


def attached(method: Method, **changes: Any) -> softkv.SoftModel:
    base = fresh(**changes)
    torch.manual_seed(1)
    return softkv.attach(base, method, tokenizer=tokenizer())


def row_logits(soft: SoftPrompt, row: Row) -> Tensor:
    """Logits `[T, V]` of one row, alone, by transformers' eager attention under masks that are written out here."""
    model, tokens = _bare(), soft.soft_tokens()
    if tokens is not None:
        words = model.get_input_embeddings()(torch.tensor(row.ids).clamp(min=0))
        if soft.placement == "inline":
            words = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
            return model(inputs_embeds=words[None]).logits[0]
        at = 0 if soft.placement == "before" else row.prompt
        logits = model(inputs_embeds=torch.cat([words[:at], tokens, words[at:]])[None]).logits[0]
        return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(row.ids))]]
    counted = not soft.encodes_rows and soft.prefix().window_covers

    def mask_of(module: Any, T: int, P: int) -> Tensor:
        at = torch.arange(P + T)
        seen = at <= at[P:, None]
        if not module.use_rope:
            return seen
        of = at // CHUNK if counted else (at - P) // CHUNK
        return seen & ((of == of[P:, None]) | ((at < P) & (not counted)))

    return behind(model, soft, row, mask_of)


@torch.no_grad()
def greedy(soft: SoftPrompt, ids: list[int], steps: int) -> list[int]:
    row = Row(list(ids), len(ids))
    for _ in range(steps):
        row = Row([*row.ids, int(row_logits(soft, row)[-1].argmax())], row.prompt)
    return row.ids[row.prompt :]


def rows_of(kind: str) -> list[Row]:
    return rows_for("p-tuning" if kind == "template" else kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_every_layout(kind: str) -> None:
    model, rows = attached(KINDS[kind]), rows_of(kind)
    wants = [row_logits(model.soft, row) for row in rows]
    sum_of(wants, rows).backward()
    parameters = dict(model.soft.named_parameters())
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    assert_in_every_layout(model, rows, wants, gradients)


@pytest.mark.parametrize("kind", ["matrices", "of a text", "an encoder", "tokens before"])
def test_generation_past_the_ends_of_chunks(kind: str) -> None:
    model = attached(KINDS[kind]).eval()
    prompts = [row.ids[: row.prompt] for row in rows_of(kind)[1::2]]
    wants = [greedy(model.soft, prompt, STEPS) for prompt in prompts]
    for side, options in (("right", {}), ("left", {"cache_implementation": "static", "disable_compile": True})):
        got = model.generate(**batch_of(prompts, side, extra=1), max_new_tokens=STEPS, **options)
        assert got[:, -STEPS:].tolist() == wants, (side, options)


@torch.no_grad()
def test_rows_with_different_adapters() -> None:
    model = attached(softkv.PrefixTuning(length=1))
    for number, (kind, method) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        model.add_adapter(kind, method)
    kinds = [kind for kind in KINDS if kind != "template"]
    rows = [rows_for("other")[number % 4] for number in range(len(kinds))]
    wants = [row_logits(model.adapters[kind], row) for kind, row in zip(kinds, rows, strict=True)]
    for layout, arrange in LAYOUTS.items():
        batch, parts = arrange(rows)
        for kind, got, want in zip(kinds, parts(model(**batch, adapter_names=kinds).logits), wants, strict=True):
            assert got.shape == want.shape, (layout, kind)
            close(got, want)
    prompts = [row.ids[: row.prompt] for row in rows]
    tokens = [greedy(model.adapters[kind], prompt, 2) for kind, prompt in zip(kinds, prompts, strict=True)]
    got = model.eval().generate(**batch_of(prompts, "left"), adapter_names=kinds, max_new_tokens=2)
    assert got[:, -2:].tolist() == tokens


@torch.no_grad()
def test_a_row_in_parts_behind_a_cache() -> None:
    """The cache of a layer in chunks drops keys."""
    for kind in ("matrices", "of a text"):
        model, ids = attached(KINDS[kind]).eval(), torch.arange(20, 33)[None]
        want = row_logits(model.soft, Row(ids[0].tolist(), 13))
        past, got = None, []
        for part in ids.split([3, 1, 4, 1, 1, 3], 1):
            out = model(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            got.append(out.logits[0])
        close(torch.cat(got), want)


@torch.no_grad()
def test_a_text_as_a_prefix_is_the_text_in_context(tmp_path: Path) -> None:
    text, row = tokenizer()(TEXT)["input_ids"], list(range(20, 29))
    want = fresh()(torch.tensor([text + row])).logits[0, len(text) :]
    model = softkv.bake(fresh(), text=TEXT, tokenizer=tokenizer())
    assert model.method.length == len(text) != 0 % CHUNK
    model.save_pretrained(tmp_path)
    prefix = Prefix.from_text(model, tokenizer(), TEXT)
    model.add_adapter("prefix", prefix)
    loaded = softkv.load(fresh(), tmp_path)
    ids = torch.tensor([row])
    for logits in (model(ids).logits, model(ids, adapter_names=["prefix"]).logits, loaded(ids).logits):
        close(logits[0], want)


@torch.no_grad()
def test_chunks_count_the_slots_of_peft(tmp_path: Path) -> None:
    ids = torch.arange(20, 31)[None]
    theirs = peft.get_peft_model(fresh(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    theirs.prompt_encoder["default"].embedding.weight.normal_()
    theirs.save_pretrained(tmp_path)
    close(softkv.load(fresh(), tmp_path)(ids).logits, theirs(input_ids=ids).logits)
    with pytest.raises(ValueError, match=r"PEFT can't express .* leave the sliding windows or chunks"):
        attached(KINDS["matrices"]).save_pretrained(tmp_path / "none", format="peft")


@torch.no_grad()
def test_queries_scaled_by_columns() -> None:
    """Where scales are all 1, nothing changes but that rows are not packed; farther columns are refused."""
    model = attached(KINDS["matrices"], attn_temperature_tuning=True, floor_scale=24).eval()
    rows = rows_for("matrices")
    wants = [row_logits(model.soft, row) for row in rows]
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        for one, want in zip(parts(model(**batch).logits), wants, strict=True):
            close(one, want)
    assert model(torch.arange(2, 2 + 23 - N)[None]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"scales queries by their columns.* up to 23, where all are alike, got 24"):
        model(torch.arange(2, 2 + 24 - N)[None])


def test_triton_counts_chunks_from_the_first_key() -> None:
    q, kv = torch.randn(1, 2, 9, 16), torch.randn(2, 1, 1, 9, 16)
    slots = torch.randn(2, 1, 1, 3, 16)
    options = {"chunk": 4, "window_covers_prefix": True, "backend": "triton"}
    with pytest.raises(NotImplementedError, match=r"chunks counted from a row's first key"):
        softkv.prefix_attention(q, *kv, *slots, **options)
