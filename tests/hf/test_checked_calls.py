"""The checks of one block hold for those that are called alike, and those of a decoding step for later steps."""

from typing import Any

import pytest
import torch

import softkv
from softkv.hf import attention, repeat
from tests.hf.tiny import model_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks whose arguments are looked at."""
    layers: list[int] = []
    look = attention._checked

    def noted(module: Any, context: Any, layer: int, *rest: Any, **options: Any) -> Any:
        layers.append(layer)
        return look(module, context, layer, *rest, **options)

    monkeypatch.setattr(attention, "_checked", noted)
    return layers


@pytest.mark.parametrize(("name", "of_steps"), [("Llama", 1), ("Mistral: a sliding window", 3)])
@torch.no_grad()
def test_one_block_is_checked(name: str, of_steps: int, checked: list[int]) -> None:
    """One in a prefill, one in all steps of a cache, and one in each step of windows."""
    model = softkv.attach(model_of(name), softkv.PTuningV2(length=3))
    checked.clear()
    model.generate(IDS, max_new_tokens=1, do_sample=False)
    assert checked == [0]
    checked.clear()
    cache = model(IDS, use_cache=True).past_key_values
    assert checked == [0]
    checked.clear()
    for _ in range(3):
        model(IDS[:, :1], past_key_values=cache)
    assert checked == [0] * of_steps
    checked.clear()
    model(IDS[:, :3], past_key_values=cache)  # several tokens at once, as assisted decoding has them
    assert checked == [0]


@torch.no_grad()
def test_another_autocast_dtype_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of a step is in the dtype of the autocast around it, not of an earlier step's."""
    model, dtypes = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=3)), []
    cache = model(IDS, use_cache=True).past_key_values
    call = repeat.CheckedCall.__call__

    def noted(self: repeat.CheckedCall, *arguments: Any) -> Any:
        dtypes.append(self.dtype)
        return call(self, *arguments)

    monkeypatch.setattr(repeat.CheckedCall, "__call__", noted)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            model(IDS[:, :1], past_key_values=cache)
    assert dtypes == [torch.bfloat16, torch.float16]
