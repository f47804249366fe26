"""The checks of one block hold for those that are called alike, and those of a decoding step for later steps."""

from typing import Any

import pytest
import torch

import softkv
from softkv.hf import attention
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


@pytest.mark.parametrize("windowed", [False, True])
@torch.no_grad()
def test_one_block_is_checked(windowed: bool, checked: list[int]) -> None:
    """One in a call, and none in further ones that are alike: a window's mask is looked at in each of them."""
    again = [0] if windowed else []
    model = softkv.attach(model_of("Mistral: a sliding window" if windowed else "Llama"), softkv.PTuningV2(length=3))
    checked.clear()
    model.generate(IDS, max_new_tokens=1, do_sample=False)
    assert checked == [0]
    checked.clear()
    cache = model(IDS, use_cache=True).past_key_values
    assert checked == again
    checked.clear()
    for _ in range(3):
        model(IDS[:, :1], past_key_values=cache)
    assert checked == [0, *again, *again]
    checked.clear()
    model(IDS[:, :3], past_key_values=cache)  # several tokens at once, as assisted decoding has them
    assert checked == [0]


@torch.no_grad()
def test_another_autocast_dtype_is_another_call() -> None:
    """Attention of a step is in the dtype of the autocast around it, not of an earlier step's."""
    model, dtypes = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=3)), []
    cache = model(IDS, use_cache=True).past_key_values
    output = model.base.get_decoder().layers[0].self_attn.o_proj
    output.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            model(IDS[:, :1], past_key_values=cache)
    assert dtypes == [torch.bfloat16, torch.float16, torch.bfloat16]
