"""Calls of attention that were checked once are taken over where nothing else differs, and nowhere else."""

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch.autograd import forward_ad

import softkv
import softkv.hf.attention
from tests.hf.tiny import model_of
from tests.robustness.models import attached, llama, scatter

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
ROWS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


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


def fresh(model: Any, cache: Any, token: int) -> torch.Tensor:
    """A step of which nothing was kept."""
    cache._softkv_state.steps.clear()
    cache._softkv_state.context = None
    model._hooks._call_cache.calls = ()
    return step(model, cache, token)


def test_learning_between_steps_shows() -> None:
    """In place, as optimisers do it, and by other memory."""
    model = attached(softkv.PTuningV2(length=4), llama(layers=2))
    cache, seen = filled(model), []
    optimizer = torch.optim.SGD(model.adapters.parameters(), lr=10.0)
    for change in range(4):
        step(model, cache, 5)
        cache.crop(-1)
        if change % 2:
            for parameter in model.adapters.parameters():
                parameter.data = 2 * parameter.data
        else:
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        got = step(model, cache, 5)
        cache.crop(-1)
        torch.testing.assert_close(got, fresh(model, cache, 5))
        cache.crop(-1)
        seen.append(got)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(seen))


def test_caches_of_different_adapters_take_turns() -> None:
    model = attached(softkv.PTuningV2(length=4), llama(layers=2))
    model.add_adapter("other", softkv.PTuningV2(length=4))
    scatter(model, 7)
    with torch.no_grad():
        names = [["default"] * 2, ["other"] * 2, ["default", "other"]]
        caches = [model(IDS, adapter_names=each, use_cache=True).past_key_values for each in names]
    for token in range(5, 8):
        for cache in caches:
            got = step(model, cache, token)
            cache.crop(-1)
            torch.testing.assert_close(got, fresh(model, cache, token))


def test_training_passes_are_checked_once(checked: list[int]) -> None:
    model = attached(softkv.PTuningV2(length=3), llama(layers=3)).train()
    checked.clear()
    grads = []
    for backend in (None, None, "reference"):
        model.backend = backend
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.adapters.parameters()])
    assert checked == [0, 0, 1, 2]
    for got in grads[:2]:
        torch.testing.assert_close(got, grads[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "tokens", "slots"), [(3, 5, 11), (1, 16, 16), (2, 1, 3), (4, 30, 30), (2, 50, 14)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_small_passes_and_of_others(rows: int, tokens: int, slots: int, packed: bool) -> None:
    model = attached(softkv.PTuningV2(length=slots), llama(layers=2)).train()
    ids = torch.randint(3, 31, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if packed:
        cu = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
        batch = {name: x.view(1, -1) for name, x in batch.items()}
        batch |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": tokens, "max_length_k": tokens}
        batch["position_ids"] = torch.arange(tokens).repeat(rows)[None]
    results = []
    for backend in (None, None, "reference"):
        model.backend = backend
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in model.adapters.parameters())])
    for got in results[:2]:
        torch.testing.assert_close(got, results[2], rtol=1e-4, atol=1e-5)


def test_transforms_are_refused_behind_passes_that_were_checked() -> None:
    model = attached(softkv.PTuningV2(length=3), llama(layers=2))
    embeds = model.get_input_embeddings()(IDS)
    for _ in range(2):
        model(inputs_embeds=embeds, use_cache=False)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        model(inputs_embeds=forward_ad.make_dual(embeds, embeds), use_cache=False)


def test_bare_steps_are_checked_once(checked: list[int]) -> None:
    model = attached(base=llama(layers=3))
    with model.disabled(), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        step(model, cache, 5)
        checked.clear()
        got = [step(model, cache, token) for token in (6, 7)]
        assert not checked
    bare, cache = llama(layers=3), None
    with torch.no_grad():
        for ids in (IDS, *(torch.full((2, 1), token) for token in (5, 6, 7))):
            output = bare(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    torch.testing.assert_close(got[1], output.logits)


def operators(model: Any) -> Counter[str]:
    """The operators of a decoding step."""
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    for token in (5, 6):
        step(model, cache, token)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step(model, cache, 7)
    return Counter(event.name for event in found.events() if event.name.startswith("aten::"))


def test_a_block_of_a_decoding_step_adds_two_copies() -> None:
    """Of a prefix that is small: of its keys and of its values."""

    def of_a_block(attach: Callable[[Any], Any]) -> Counter[str]:
        few, more = (operators(attach(llama(layers=layers))) for layers in (2, 3))
        return Counter({name: more[name] - few[name] for name in more if more[name] != few[name]})

    ours, bare = of_a_block(lambda base: attached(base=base)), of_a_block(lambda base: base)
    inside = {"aten::narrow", "aten::slice", "aten::as_strided", "aten::copy_", "aten::transpose"}  # of a copy
    assert {name: number for name, number in (ours - bare).items() if name not in inside} == {"aten::cat": 2}


@torch.no_grad()
def test_packed_rows_do_not_repeat_a_row_of_their_length() -> None:
    """A prefill of padded prompts is packed: its line has the shape of one row, but not its visibility."""
    prompts = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11], [0, 0, 12, 13]])
    row = torch.arange(5, 5 + int((prompts > 0).sum()))[None]

    def answers(model: Any) -> torch.Tensor:
        out = model.generate(
            prompts, attention_mask=(prompts > 0).long(), max_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    model, other = (attached(softkv.PTuningV2(length=3, init="random")) for _ in range(2))
    other.load_state_dict(model.state_dict())
    prompts_first, row_first = answers(model), other(row).logits
    torch.testing.assert_close(model(row).logits, row_first)
    torch.testing.assert_close(answers(other), prompts_first)
    torch.testing.assert_close(answers(model), prompts_first)


@pytest.mark.parametrize("windowed", [False, True])
@torch.no_grad()
def test_one_block_is_checked(windowed: bool, checked: list[int]) -> None:
    """One in a call, and none in further ones that are alike: a window's mask is looked at in each of them."""
    again = [0] if windowed else []
    model = softkv.attach(model_of("Mistral: a sliding window" if windowed else "Llama"), softkv.PTuningV2(length=3))
    checked.clear()
    model.generate(ROWS, max_new_tokens=1, do_sample=False)
    assert checked == [0]
    checked.clear()
    cache = model(ROWS, use_cache=True).past_key_values
    assert checked == again
    checked.clear()
    for _ in range(3):
        model(ROWS[:, :1], past_key_values=cache)
    assert checked == [0, *again, *again]
    checked.clear()
    model(ROWS[:, :3], past_key_values=cache)  # several tokens at once, as assisted decoding has them
    assert checked == [0]


@torch.no_grad()
def test_another_autocast_dtype_is_another_call() -> None:
    """Attention of a step is in the dtype of the autocast around it, not of an earlier step's."""
    model, dtypes = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=3)), []
    cache = model(ROWS, use_cache=True).past_key_values
    output = model.base.get_decoder().layers[0].self_attn.o_proj
    output.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            model(ROWS[:, :1], past_key_values=cache)
    assert dtypes == [torch.bfloat16, torch.float16, torch.bfloat16]


@torch.no_grad()
def test_copies_after_a_pass() -> None:
    """Calls kept by passes are not copied: a copy, as averages of weights need it, checks its own."""
    model = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=3))
    want = model(ROWS).logits
    assert model._hooks._call_cache.calls
    copied = copy.deepcopy(model)
    assert not copied._hooks._call_cache.calls
    assert torch.equal(copied(ROWS).logits, want)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert torch.equal(averaged(ROWS).logits, want)
