"""Calls of attention that were checked once are taken over where nothing else differs, and nowhere else."""

from typing import Any

import pytest
import torch
import transformers

import softkv
import softkv.hf.attention
from tests.robustness.models import attached, llama

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of calls that were looked at in full."""
    seen: list[int] = []
    check = softkv.hf.attention._checked

    def noted(module: Any, context: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(layer)
        return check(module, context, layer, *args, **kwargs)

    monkeypatch.setattr(softkv.hf.attention, "_checked", noted)
    return seen


def step(model: Any, cache: Any, token: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.full((2, 1), token), past_key_values=cache).logits


def filled(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS, past_key_values=transformers.DynamicCache()).past_key_values


def test_decoding_steps_are_checked_once(checked: list[int]) -> None:
    model = attached(base=llama(layers=3))
    checked.clear()  # of the probe
    cache = filled(model)
    assert checked == [0]
    for token in range(4):
        step(model, cache, token + 5)
    assert checked == [0, 0]


@pytest.mark.parametrize("what", ["backend", "length", "values"])
def test_what_changes_between_steps_shows(what: str, checked: list[int]) -> None:
    model = attached(softkv.PTuningV2(length=4), llama(layers=2))
    cache = filled(model)
    step(model, cache, 5)
    soft = model.soft
    if what == "backend":
        model.backend = "reference"
    elif what == "length":
        soft.k, soft.v = (torch.nn.Parameter(2 * x.detach()[..., :2, :]) for x in (soft.k, soft.v))
    else:
        with torch.no_grad():
            soft.k.mul_(2)
    cache.crop(-1)
    checked.clear()
    got = step(model, cache, 6)
    assert bool(checked) == (what != "values")
    cache.crop(-1)
    cache._softkv_state.steps.clear()
    torch.testing.assert_close(got, step(model, cache, 6))


def test_gradients_flow_behind_steps_without() -> None:
    model = attached(softkv.PTuningV2(length=4), llama(layers=2))
    cache = filled(model)
    step(model, cache, 5)
    model(torch.full((2, 1), 6), past_key_values=cache).logits.sum().backward()
    assert model.soft.k.grad.abs().sum() > 0
