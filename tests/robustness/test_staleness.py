"""Whatever changes a weight shows in the next call: each way to change one, for every kind of soft prompt that is
computed from weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import softkv
from tests.robustness.models import IDS, VOCAB, attached, llama

METHODS = {
    "head": softkv.PromptTuning(length=3, position="before"),
    "after": softkv.PromptTuning(length=3),
    "template": softkv.PTuning(template="[P1][P2][X][Y]", encoder_size=8),
    "prefix": softkv.PTuningV2(length=3),
    "reparametrized": softkv.PTuningV2(length=3, reparametrize=True, reparametrize_size=8),
}


def by_data(model: softkv.SoftModel) -> None:
    for parameter in model.adapters.parameters():
        parameter.data = parameter.data * 1.5 + 0.1


def in_place(model: softkv.SoftModel) -> None:
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.mul_(1.5).add_(0.1)


def in_place_by_data(model: softkv.SoftModel) -> None:
    for parameter in model.adapters.parameters():
        parameter.data.mul_(1.5).add_(0.1)


def by_vector(model: softkv.SoftModel) -> None:
    vector = nn.utils.parameters_to_vector(model.adapters.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.5 + 0.1, model.adapters.parameters())


def by_numpy(model: softkv.SoftModel) -> None:
    for parameter in model.adapters.parameters():
        parameter.detach().numpy()[...] += 0.3


def by_state_dict(model: softkv.SoftModel) -> None:
    state = {name: value * 1.5 + 0.1 for name, value in model.adapters.state_dict().items()}
    model.adapters.load_state_dict(state)


def by_assigned_state_dict(model: softkv.SoftModel) -> None:
    state = {name: value * 1.5 + 0.1 for name, value in model.adapters.state_dict().items()}
    model.adapters.load_state_dict(state, assign=True)


def by_an_optimizer(model: softkv.SoftModel) -> None:
    with torch.enable_grad():
        sum(parameter.sum() for parameter in model.adapters.parameters()).backward()
    torch.optim.SGD(model.adapters.parameters(), lr=0.3).step()


def by_another_adapter(model: softkv.SoftModel) -> None:
    method = model.method
    model.add_adapter("kept", softkv.PTuningV2(length=1))
    model.set_adapter("kept")
    model.delete_adapter("default")
    torch.manual_seed(7)
    model.add_adapter("default", method)
    model.set_adapter("default")
    in_place(model)


def base_in_place(model: softkv.SoftModel) -> None:
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(1.2)


def base_by_data(model: softkv.SoftModel) -> None:
    for parameter in model.base.parameters():
        parameter.data = parameter.data * 1.2


def base_by_state_dict(model: softkv.SoftModel) -> None:
    model.base.load_state_dict({name: value * 1.2 for name, value in model.base.state_dict().items()})


def base_by_tensor_swap(model: softkv.SoftModel) -> None:
    layer = model.base.model.layers[0].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)


def base_module_replaced(model: softkv.SoftModel) -> None:
    block = model.base.model.layers[0].self_attn
    new = nn.Linear(block.k_proj.in_features, block.k_proj.out_features, bias=False)
    block.k_proj = new.requires_grad_(False)


WAYS = (
    by_data, in_place, in_place_by_data, by_vector, by_numpy, by_state_dict, by_assigned_state_dict, by_an_optimizer,
    by_another_adapter, base_in_place, base_by_data, base_by_state_dict, base_by_tensor_swap, base_module_replaced,
)  # fmt: skip


def rows(model: softkv.SoftModel) -> torch.Tensor:
    soft = torch.tensor([[-1, -2]]) if model.soft.placement == "inline" else IDS[:, :0]
    return torch.cat([soft, IDS], 1)


def answers(model: softkv.SoftModel) -> list[torch.Tensor]:
    """By every door: a forward, a batch of two adapters, generate."""
    ids = rows(model)
    found = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    mixed = torch.cat([ids, ids.clamp(min=2)])
    return [
        model(ids).logits,
        model(mixed, adapter_names=[model.active_adapter, None]).logits,
        torch.stack(found.logits),
    ]


def fresh(model: softkv.SoftModel) -> softkv.SoftModel:
    """A soft model of the same weights that has never answered."""
    base = llama()
    base.load_state_dict(model.base.state_dict())
    other = softkv.attach(base, model.method)
    other.adapters["default"].load_state_dict(model.adapters["default"].state_dict())
    return other.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_changed_weight_shows(way: Callable[[Any], None], method: str) -> None:
    model = attached(METHODS[method])
    with torch.no_grad():
        before = answers(model)
        way(model)
        after, want = answers(model), answers(fresh(model))
    for found, old, new in zip(after, before, want, strict=True):
        torch.testing.assert_close(found, new)
        assert not torch.allclose(found, old, atol=1e-3)


def test_lora_in_the_base() -> None:
    """Added, switched off and on, merged and unmerged: the head is of the base as it is."""
    peft = pytest.importorskip("peft")
    model = attached(METHODS["head"])
    with torch.no_grad():
        bare = model(IDS).logits
        config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, r=4)
        tuned = peft.inject_adapter_in_model(config, model.base)
        adapted = model(IDS).logits
        assert not torch.allclose(adapted, bare, atol=1e-3)
        layers = [module for module in tuned.modules() if isinstance(module, peft.tuners.lora.Linear)]
        for change, want in (
            (lambda layer: layer.enable_adapters(False), bare),
            (lambda layer: layer.enable_adapters(True), adapted),
            (lambda layer: layer.merge(), adapted),
            (lambda layer: layer.unmerge(), adapted),
        ):
            for layer in layers:
                change(layer)
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_a_cache_keeps_what_filled_it() -> None:
    """Rows of a cache go on with the head that they were read with, as they would with its K and V in the cache; copies
    do too."""
    model = attached(METHODS["head"])
    with torch.no_grad():
        output = model(IDS, use_cache=True)
        copied = copy.deepcopy(output.past_key_values)
        token = torch.tensor([[VOCAB - 1]])
        want = model(torch.cat([IDS, token], 1)).logits[:, -1:]
        in_place(model)
        torch.testing.assert_close(model(token, past_key_values=copied).logits, want)
        torch.testing.assert_close(model(token, past_key_values=output.past_key_values).logits, want)
    with torch.enable_grad():  # what learns is read anew
        cache = model(IDS, use_cache=True).past_key_values
        model(token, past_key_values=cache).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapters.parameters())
