"""Prefixes of other training code: what the script in docs/interop.md makes of its files answers as that code does."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

import softkv
from tests.hf.naive import close
from tests.hf.tiny import model_of

DOCS = Path(__file__).parents[2] / "docs" / "interop.md"
P, NAME = 3, "GPTNeoX: parallel residual, partial rotary"  # as many key/value heads as heads
IDS = torch.tensor([[5, 9, 3, 7, 2]])


def convert(state: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the documented script on a pickled state."""
    source, target = directory / "state.pt", directory / "prefix.safetensors"
    torch.save(state, source)
    script = next(code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "convert.py" in code)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(source), str(target)])
    exec(script, {})
    return target


@torch.no_grad()
def with_cache(model: Any, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits after keys and values `[1, G, P, D]` of each layer."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(layers):
        cache.update(k, v, layer)
    return model(IDS, past_key_values=cache, position_ids=P + torch.arange(IDS.shape[1])[None]).logits


class PrefixEncoder(nn.Module):
    """As in the P-tuning v2 repository."""

    def __init__(self, config: Any, projection: bool) -> None:
        super().__init__()
        self.layers, self.heads, C = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        self.embedding = nn.Embedding(P, C if projection else self.layers * 2 * C)
        if projection:
            self.trans = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, self.layers * 2 * C))

    def past_key_values(self) -> list[tuple[Tensor, Tensor]]:
        flat = self.embedding(torch.arange(P)[None])
        flat = self.trans(flat) if hasattr(self, "trans") else flat
        both = flat.view(1, P, self.layers * 2, self.heads, -1).permute(2, 0, 3, 1, 4).split(2)
        return [(k, v) for k, v in both]


@pytest.mark.parametrize("projection", [False, True])
def test_the_p_tuning_v2_repository(projection: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    model = model_of(NAME)
    encoder = PrefixEncoder(model.config, projection)
    whole = nn.ModuleDict({"prefix_encoder": encoder, "classifier": nn.Linear(2, 2)})
    path = convert(whole.state_dict(), tmp_path, monkeypatch)
    loaded = softkv.load(model_of(NAME), path)
    assert loaded.method == softkv.PTuningV2(length=P, window_covers=True)
    with torch.no_grad():
        close(loaded(IDS).logits, with_cache(model, encoder.past_key_values()))
    with pytest.raises(ValueError, match=r"expected a prefix of shape \[P, 64\]"):
        softkv.load(model_of("Llama"), path)


@pytest.mark.parametrize(("front", "frozen"), [("frozen", 1), ("fixed", 2), ("frozen", 0)])
def test_cartridges(front: str, frozen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    layers = [tuple(torch.randn(2, 1, 2, P, 8).unbind()) for _ in range(2)]
    state = {}
    for kind, number in (("keys", 0), ("values", 1)):
        whole = [layer[number] for layer in layers]
        state[f"trainable_{kind}"] = nn.ParameterList(nn.Parameter(x[:, :, frozen:]) for x in whole)
        state[f"{front}_{kind}"] = nn.ParameterList(nn.Parameter(x[:, :, :frozen]) for x in whole if frozen)
    loaded = softkv.load(model_of("Llama"), convert(state, tmp_path, monkeypatch))
    assert loaded.method == softkv.PTuningV2(length=P, window_covers=False)
    with torch.no_grad():
        close(loaded(IDS).logits, with_cache(model_of("Llama"), layers))


ENCODER = {
    "prefix_encoder.embedding.weight": torch.ones(P, 32),
    "prefix_encoder.trans.0.weight": torch.ones(6, 32),
    "prefix_encoder.trans.0.bias": torch.ones(6),
    "prefix_encoder.trans.2.weight": torch.ones(128, 6),
    "prefix_encoder.trans.2.bias": torch.ones(128),
}
CACHE = {f"{part}_{kind}.{l}": torch.ones(1, 2, 2, 8) for part in ("frozen", "trainable") for kind in ("keys", "values")
         for l in range(2)}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half an encoder": (ENCODER | {"prefix_encoder.trans.0.bias": None}, "expects embedding.weight, trans.0.bias"),
    "an encoder that does not fit": (
        ENCODER | {"prefix_encoder.trans.2.weight": torch.ones(128, 5)},
        "inconsistent shapes",
    ),
    "an encoder that explodes": (ENCODER | {"prefix_encoder.embedding.weight": torch.ones(400, 32)}, "only 6 hidden"),
    "a layer that is missing": (CACHE | {"trainable_values.1": None}, r"got \['trainable_values.1'\]"),
    "layers that differ": (CACHE | {"trainable_keys.1": torch.ones(1, 2, 3, 8)}, "keys that don't fit together"),
    "keys and values that differ": (
        {name: x if "keys" in name else torch.ones(1, 2, 3, 8) for name, x in CACHE.items()},
        r"values \[1, G, P, Dv\] in every layer",
    ),
    "values of another width than the model's": (
        {name: x if "keys" in name else torch.ones(1, 2, 2, 9) for name, x in CACHE.items()},
        "'v' has shape .*, 9",
    ),
    "only a frozen part of a layer": (CACHE | {"trainable_keys.9999": torch.ones(1)}, "in every layer, got"),
    "another number of axes": ({name: torch.ones(2) for name in CACHE}, "that don't fit together"),
    "a batch of two": (
        {name: torch.ones(2, 2, 2, 8) for name in CACHE},
        r"keys \[1, G, P, D\] and values \[1, G, P, Dv\]",
    ),
    "something else": ({"lm_head.weight": torch.ones(2)}, "neither a prefix encoder .* it contains lm_head.weight"),
    "nothing": ({}, "it contains nothing"),
    "NaN": (CACHE | {"trainable_keys.0": torch.ones(1, 2, 2, 8) * torch.nan}, "NaN or infinite"),
    "another base": ({name: torch.ones(1, 3, 2, 8) for name in CACHE}, "it does not fit its config or this base"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    tensors, message = WRONG[case]
    save_file({name: x.clone() for name, x in tensors.items() if x is not None}, tmp_path / "prefix.safetensors")
    model = model_of("Llama")
    with pytest.raises(ValueError, match=message):
        softkv.load(model, tmp_path / "prefix.safetensors")
    assert model.config._attn_implementation == "eager"


def test_pickles_are_never_read(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "cache-step1.pt")
    with pytest.raises(ValueError, match=r"cache-step1.pt is a pickle, which softkv never reads: docs/interop.md has"):
        softkv.load(model_of("Llama"), tmp_path / "cache-step1.pt")
