"""Values with a width of their own (multi-head latent attention): what is learned has it, in every method, batch, file
and step, and nothing of it is without effect."""

from pathlib import Path

import pytest
import torch

import softkv
from softkv.io import checkpoint
from softkv.methods.base import Method
from tests.hf.continuations import batch_of
from tests.hf.latent import DV, C, D, G, L, fresh, greedy, row_logits
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, assert_in_every_layout, rows_for, sum_of
from tests.hf.tiny import METHODS, TEXT, tokenizer

MODELS = ["DeepseekV3", "MiniCPM3"]
N, E, STEPS = 5, 8, 4
LSTM = 2 * (4 * E // 2 * (C + E // 2 + 2))

# method → what it learns
LEARNED: dict[str, tuple[Method, int]] = {
    "prefix-tuning": (softkv.PrefixTuning(length=N, init_std=0.5), N * G * (D + DV)),
    "p-tuning v2": (softkv.PTuningV2(length=N, init_std=0.5), N * G * (D + DV) * L),
    "of tokens": (softkv.PTuningV2(length=N, init="vocabulary"), N * G * (D + DV) * L),
    "reparametrised": (
        softkv.PTuningV2(length=N, init_std=0.5, reparametrize=True, reparametrize_size=E),
        N * E + E * (E + 1) + G * (D + DV) * L * (E + 1),
    ),
    "an encoder": (
        softkv.PTuningV2(length=N, init_std=0.5, encoder="lstm", encoder_size=E),
        LSTM + E * (E + 1) + G * (D + DV) * (E + 1),
    ),
}


def attached(name: str, method: Method) -> softkv.SoftModel:
    base = fresh(name)
    torch.manual_seed(1)
    return softkv.attach(base, method, tokenizer=tokenizer())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LEARNED)
def test_all_that_is_learned_has_an_effect(name: str, kind: str) -> None:
    method, count = LEARNED[kind]
    model, rows = attached(name, method), rows_for(kind)
    assert model.num_trainable() == count
    wants = [row_logits(name, model.soft, row) for row in rows]
    sum_of(wants, rows).backward()
    parameters = dict(model.soft.named_parameters())
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    for key, gradient in gradients.items():
        assert gradient is not None, key
        if key in ("k", "v"):
            assert bool((gradient != 0).all()), key
        else:  # each row of a weight; of the rest, some may rest behind a ReLU
            last = key.split(".")[-2:] in (["2", "weight"], ["2", "bias"])
            assert bool(gradient.flatten(1).any(1).all() if last and gradient.dim() == 2 else gradient.any()), key
    assert_in_every_layout(model, rows, wants, gradients)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LEARNED)
def test_generation_is_recomputation(name: str, kind: str) -> None:
    model = attached(name, LEARNED[kind][0]).eval()
    prompts = [row.ids[: row.prompt] for row in rows_for(kind)]
    wants = [greedy(name, model.soft, prompt, STEPS) for prompt in prompts]
    for side, options in (("left", {}), ("right", {"cache_implementation": "static"})):
        got = model.generate(**batch_of(prompts, side, extra=1), max_new_tokens=STEPS, **options)
        assert got[:, -STEPS:].tolist() == wants, (side, options)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_all_lengths_in_one_batch(name: str) -> None:
    kinds: dict[str, Method] = {kind: method for kind, (method, _) in LEARNED.items()} | {
        "longer": softkv.PTuningV2(length=11, init_std=0.5),
        "a head": METHODS["prompt-tuning before"],
        "a block behind": METHODS["prompt-tuning after"],
        "a text": METHODS["p-tuning v2 of a text"],
    }
    model = attached(name, softkv.PrefixTuning(length=1))
    for number, (kind, method) in enumerate(kinds.items()):
        torch.manual_seed(number)
        model.add_adapter(kind, method)
    names = [*kinds, *list(kinds)[::3]]
    rows = [rows_for("other")[number % 4] for number in range(len(names))]
    wants = [row_logits(name, model.adapters[kind], row) for kind, row in zip(names, rows, strict=True)]
    for layout, arrange in LAYOUTS.items():
        batch, parts = arrange(rows)
        for kind, got, want in zip(names, parts(model(**batch, adapter_names=names).logits), wants, strict=True):
            assert got.shape == want.shape, (layout, kind)
            close(got, want)
    prompts = [row.ids[: row.prompt] for row in rows]
    tokens = [greedy(name, model.adapters[kind], p, STEPS) for kind, p in zip(names, prompts, strict=True)]
    got = model.eval().generate(**batch_of(prompts, "left"), adapter_names=names, max_new_tokens=STEPS)
    assert got[:, -STEPS:].tolist() == tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_saved_and_loaded(name: str, folded: bool, kind: str, tmp_path: Path) -> None:
    model, ids = attached(name, LEARNED[kind][0]).eval(), torch.tensor([[3, 4, 5]])
    model.save_pretrained(tmp_path, folded=folded)
    loaded = softkv.load(fresh(name), tmp_path)
    assert loaded.method == model.method
    assert loaded.base_shape.value_dim == DV
    close(loaded(ids).logits, model(ids).logits, 1e-6)
    if not folded or kind != "reparametrised":
        state = loaded.soft.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.soft.state_dict().items())


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_files_with_values_as_wide_as_keys(folded: bool, kind: str, tmp_path: Path) -> None:
    """Older files hold them so; attention did not read the rest."""
    model, ids = attached("MiniCPM3", LEARNED[kind][0]).eval(), torch.tensor([[3, 4, 5]])
    config, tensors = checkpoint.describe(model, folded=folded)
    assert config["base"].pop("value_dim") == DV
    widened = {}
    for name, tensor in tensors.items():
        if name == "v":
            tensor = torch.cat([tensor, torch.full_like(tensor[..., : D - DV], 7.0)], -1)
        elif name.split(".")[-2:] in (["2", "weight"], ["2", "bias"]):
            k, v = tensor.unflatten(0, (-1, G * (D + DV))).split([G * D, G * DV], 1)
            v = v.unflatten(1, (G, DV))
            v = torch.cat([v, torch.full_like(v[:, :, : D - DV], 7.0)], 2)
            tensor = torch.cat([k, v.flatten(1, 2)], 1).flatten(0, 1)
        widened[name] = tensor.contiguous()
    checkpoint.save_file(widened, tmp_path / "softkv.safetensors", metadata=checkpoint.header(config, widened))
    loaded = softkv.load(fresh("MiniCPM3"), tmp_path)
    close(loaded(ids).logits, model(ids).logits, 1e-6)
    state = {key: value.clone() for key, value in loaded.soft.state_dict().items()}
    if not folded or not model.soft.foldable:
        with torch.no_grad():
            for parameter in model.soft.parameters():
                parameter.zero_()
        checkpoint.restore(model, tmp_path)
        assert all(torch.equal(state[key], value) for key, value in model.soft.state_dict().items())


def test_peft_holds_one_width(tmp_path: Path) -> None:
    model = attached("MiniCPM3", softkv.PTuningV2(length=N))
    with pytest.raises(ValueError, match=r"PEFT can't express .* keys and values of one width .* are 8 and 6 wide"):
        model.save_pretrained(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prefixes_of_a_text_and_of_soft_tokens(name: str, tmp_path: Path) -> None:
    text, row = tokenizer()(TEXT)["input_ids"], [20, 21, 22]
    want = fresh(name)(torch.tensor([text + row])).logits[0, len(text) :]
    prefix = softkv.Prefix.from_text(fresh(name), tokenizer(), TEXT)
    assert prefix.k.shape == (L, 1, G, len(text), D)
    assert prefix.v.shape == (L, 1, G, len(text), DV)
    model = attached(name, softkv.PrefixTuning(length=1)).eval()
    model.add_adapter("text", prefix)
    close(model(torch.tensor([row]), adapter_names=["text"]).logits[0], want)
    soft = attached(name, METHODS["prompt-tuning before"]).eval()
    baked = softkv.bake(soft)
    close(baked(torch.tensor([row])).logits, soft(torch.tensor([row])).logits)
    baked.save_pretrained(tmp_path)
    close(softkv.load(fresh(name), tmp_path)(torch.tensor([row])).logits, soft(torch.tensor([row])).logits)


def test_a_prefix_of_other_widths_is_refused() -> None:
    model = attached("MiniCPM3", softkv.PrefixTuning(length=1))
    with pytest.raises(ValueError, match=r"expected k \[2 or 1, 1, 4, P, 8\] and v \[2 or 1, 1, 4, P, 6\]"):
        model.add_adapter("wide", softkv.Prefix(*torch.zeros(2, L, 1, G, N, D)))
    with pytest.raises(ValueError, match=r"k \[L or 1, A, G, P, D\] and v \[L or 1, A, G, P, Dv\]"):
        softkv.Prefix(torch.zeros(L, 1, G, N, D), torch.zeros(L, 1, G, N + 1, DV))
