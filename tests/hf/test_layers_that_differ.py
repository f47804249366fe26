"""Layers with key/value heads or head dims of their own (Gemma 4, MiMo-V2-Flash), and layers that read the keys and
values of an earlier one: each block has slots of its own, in every method, batch, file and step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import softkv
from softkv.methods.base import Method
from softkv.prefix import Prefix
from tests.hf.continuations import batch_of
from tests.hf.differing import EMBEDS, MODELS, SHARING, fresh, greedy, row_logits
from tests.hf.naive import Row, close
from tests.hf.rows import LAYOUTS, assert_in_every_layout, rows_for, sum_of
from tests.hf.tiny import METHODS, TEXT, tokenizer

N, E, C, STEPS = 5, 8, 32, 3
LSTM = 2 * (4 * E // 2 * (C + E // 2 + 2))

KINDS: dict[str, Method] = {
    "matrices": softkv.PTuningV2(length=N, init_std=0.5),
    "of tokens": softkv.PTuningV2(length=N, init="vocabulary"),
    "reparametrised": softkv.PTuningV2(length=N, init_std=0.5, reparametrize=True, reparametrize_size=E),
    "an encoder": softkv.PTuningV2(length=N, init_std=0.5, encoder="lstm", encoder_size=E),
    "an encoder each": softkv.PTuningV2(length=N, init_std=0.5, encoder="lstm", encoder_size=E, share_encoder=False),
}


def attached(name: str, method: Method) -> softkv.SoftModel:
    base = fresh(name)
    torch.manual_seed(1)
    return softkv.attach(base, method, tokenizer=tokenizer())


def count_of(name: str, kind: str) -> int:
    """What a method learns, of the formula in its docstring."""
    widths = MODELS[name][2]
    slots = [G * (D + Dv) for G, D, Dv in widths]
    if kind == "reparametrised":
        return N * E + E * (E + 1) + sum(slots) * (E + 1)
    if kind == "an encoder":
        return LSTM + sum(E * (E + 1) + of_slot * (E + 1) for of_slot in dict(zip(widths, slots, strict=True)).values())
    if kind == "an encoder each":
        return sum(LSTM + E * (E + 1) + of_slot * (E + 1) for of_slot in slots)
    return N * sum(slots)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_block_reads_slots_of_its_own(name: str, kind: str) -> None:
    model, rows = attached(name, KINDS[kind]), rows_for(kind)
    assert model.num_trainable() == count_of(name, kind)
    wants = [row_logits(name, model.soft, row) for row in rows]
    sum_of(wants, rows).backward()
    parameters = dict(model.soft.named_parameters())
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    if kind in ("matrices", "of tokens"):
        widths = MODELS[name][2]
        shapes = {f"k_{layer}": (1, G, N, D) for layer, (G, D, _) in enumerate(widths)}
        shapes |= {f"v_{layer}": (1, G, N, Dv) for layer, (G, _, Dv) in enumerate(widths)}
        if len({D for _, D, _ in widths}) == len({G for G, _, _ in widths}) == 1:
            raise AssertionError("these layers are alike")
        assert {key: tuple(parameter.shape) for key, parameter in parameters.items()} == shapes
        assert all(bool((gradient != 0).all()) for gradient in gradients.values() if gradient is not None)
    assert_in_every_layout(model, rows, wants, gradients)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["matrices", "an encoder"])
def test_generation_is_recomputation(name: str, kind: str) -> None:
    model = attached(name, KINDS[kind]).eval()
    prompts = [row.ids[: row.prompt] for row in rows_for(kind)[::3]]
    wants = [greedy(name, model.soft, prompt, STEPS) for prompt in prompts]
    for side, options in (("left", {}), ("right", {"cache_implementation": "static", "disable_compile": True})):
        got = model.generate(**batch_of(prompts, side, extra=1), max_new_tokens=STEPS, **options)
        assert got[:, -STEPS:].tolist() == wants, (side, options)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_all_lengths_in_one_batch(name: str) -> None:
    kinds = KINDS | {"longer": softkv.PTuningV2(length=11, init_std=0.5)}
    if name in EMBEDS:
        kinds |= {key: METHODS[f"prompt-tuning {key}"] for key in ("before", "after")}
    model = attached(name, softkv.PTuningV2(length=1))
    for number, (kind, method) in enumerate(kinds.items()):
        torch.manual_seed(number)
        model.add_adapter(kind, method)
    rows = [rows_for("other")[number % 4] for number in range(len(kinds))]
    wants = [row_logits(name, model.adapters[kind], row) for kind, row in zip(kinds, rows, strict=True)]
    for layout, arrange in LAYOUTS.items():
        batch, parts = arrange(rows)
        for kind, got, want in zip(kinds, parts(model(**batch, adapter_names=[*kinds]).logits), wants, strict=True):
            assert got.shape == want.shape, (layout, kind)
            close(got, want)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_text_as_a_prefix_is_the_text_in_context(name: str, tmp_path: Path) -> None:
    """Windows, which count the slots of a text, are shorter than it."""
    text, row = tokenizer()(TEXT)["input_ids"], [20, 21, 22]
    want = fresh(name)(torch.tensor([text + row])).logits[0, len(text) :]
    prefix = Prefix.from_text(fresh(name), tokenizer(), TEXT)
    assert prefix.length == len(text)
    started = attached(name, softkv.PTuningV2(init="text", init_text=TEXT)).eval()
    started.add_adapter("prefix", prefix)
    baked = softkv.bake(fresh(name), text=TEXT, tokenizer=tokenizer()).eval()
    baked.save_pretrained(tmp_path)
    for model, options in (
        (started, {}),
        (started, {"adapter_names": ["prefix"]}),
        (baked, {}),
        (softkv.load(fresh(name), tmp_path), {}),
    ):
        close(model(torch.tensor([row]), **options).logits[0], want)


@pytest.mark.parametrize("name", EMBEDS)
@torch.no_grad()
def test_soft_tokens_in_front_become_a_prefix(name: str) -> None:
    soft = attached(name, METHODS["prompt-tuning before"]).eval()
    row = Row([20, 21, 22, 23, 24, 25], 2)
    want = row_logits(name, soft.soft, row)
    ids = torch.tensor([row.ids])
    close(soft(ids).logits[0], want)
    close(soft(ids, use_cache=True).logits[0], want)
    close(softkv.bake(soft)(ids).logits[0], want)


@pytest.mark.parametrize(("name", "folded"), [*((name, True) for name in MODELS), (SHARING, False)])
@pytest.mark.parametrize("kind", ["matrices", "reparametrised", "an encoder"])
@torch.no_grad()
def test_saved_and_loaded(name: str, folded: bool, kind: str, tmp_path: Path) -> None:
    model, ids = attached(name, KINDS[kind]).eval(), torch.tensor([[3, 4, 5]])
    model.save_pretrained(tmp_path, folded=folded)
    loaded = softkv.load(fresh(name), tmp_path)
    assert loaded.method == model.method
    assert loaded.base_shape.by_layer == tuple(MODELS[name][2])
    close(
        loaded(ids, prompt_lengths=torch.tensor([2])).logits, model(ids, prompt_lengths=torch.tensor([2])).logits, 1e-6
    )
    other = next(each for each in MODELS if each != name)
    with pytest.raises(ValueError, match="another base model"):
        softkv.load(fresh(other), tmp_path)


def _filled(model: softkv.SoftModel, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(getattr(model.soft, f"k_{layer}"), getattr(model.soft, f"v_{layer}"), layer)
    return cache


@torch.no_grad()
def test_layers_that_read_earlier_keys_read_their_slots_from_the_cache() -> None:
    """Where slots are those of the layer that owns the keys and values, a cache that holds them answers alike."""
    model = attached(SHARING, softkv.PTuningV2(length=N, init_std=0.5, window_covers=True)).eval()
    for layer in (0, 1):
        for name in ("k", "v"):
            getattr(model.soft, f"{name}_{layer + 2}").copy_(getattr(model.soft, f"{name}_{layer}"))
    ids = torch.tensor([[20, 21, 22, 23, 24, 25, 26]])
    inputs: dict[str, Any] = {
        "attention_mask": torch.ones(1, N + ids.shape[1]),
        "position_ids": N + torch.arange(ids.shape[1])[None],
    }
    want = fresh(SHARING)(ids, past_key_values=_filled(model), **inputs).logits
    close(model(ids).logits, want)
    model.add_adapter("of the cache", Prefix.from_cache(_filled(model)))
    close(model(ids, adapter_names=["of the cache"]).logits, want)
    model.soft.k_2.add_(1.0)  # slots of a layer's own
    assert (model(ids).logits - want).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_what_needs_layers_that_are_alike_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PrefixTuning has one key .* layers differ .* use PTuningV2"):
        attached(name, softkv.PrefixTuning(length=N))
    model = attached(name, KINDS["matrices"])
    with pytest.raises(ValueError, match=r"PEFT can't express .* layers differ"):
        model.save_pretrained(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"expected k \[1, G, P, D\] and v .* of each layer, \(G, D, Dv\) = \[\("):
        model.add_adapter("alike", Prefix(*torch.zeros(2, len(MODELS[name][2]), 1, 2, N, 8)))
    with pytest.raises(ValueError, match=r"Prefix expects .* or tuples of layers"):
        Prefix((torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)), (torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)))
