"""Models called from inside a `generate` answer as they do outside of it."""

import copy
from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.robustness.models import IDS, attached, llama


class Inside(transformers.LogitsProcessor, transformers.StoppingCriteria):
    """Calls something with the ids that it sees, from wherever generate lets it."""

    def __init__(self, call: Any) -> None:
        self.call, self.seen = call, []

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        self.seen.append((input_ids, self.call(input_ids)))
        return scores

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((IDS, self.call(IDS)))

    def end(self) -> None:
        pass


class Stop(Inside):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        super().__call__(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


WAYS = {
    "processor": lambda call: {"logits_processor": [Inside(call)]},
    "criterion": lambda call: {"stopping_criteria": [Stop(call)]},
    "streamer": lambda call: {"streamer": Inside(call)},
}
METHODS = {
    "prefix": softkv.PTuningV2(length=4),
    "head": softkv.PromptTuning(length=3, position="before"),
    "after": softkv.PromptTuning(length=2),
    "encoder": softkv.PTuningV2(length=2, encoder="lstm", encoder_size=8),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_inside_generate(way: str, method: str) -> None:
    model = attached(METHODS[method])
    second = attached(softkv.PTuningV2(length=2), model.base)
    second.add_adapter("b", softkv.PromptTuning(length=1, position="before"))

    def disabled(ids: torch.Tensor) -> torch.Tensor:
        with model.disabled():
            return model(ids).logits

    def nested(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=2)

    def prefix(ids: torch.Tensor) -> torch.Tensor:
        return softkv.Prefix.from_ids(model, ids).k

    calls = {
        "disabled": disabled,
        "itself": lambda ids: model(ids).logits,
        "nested generate": nested,
        "another soft model on the base": lambda ids: second(ids).logits,
        "two adapters of another": lambda ids: second(ids.expand(2, -1), adapter_names=["default", "b"]).logits,
        "the base": lambda ids: model.base(ids).logits,
        "a text prefix": prefix,
    }
    want_ids = model.generate(IDS, max_new_tokens=3)
    for name, call in calls.items():
        options = WAYS[way](call)
        inside = options.get("streamer") or next(iter(options.values()))[0]
        assert torch.equal(model.generate(IDS, max_new_tokens=3, **options), want_ids), name
        assert inside.seen
        for ids, found in inside.seen:
            with torch.no_grad():
                torch.testing.assert_close(found, call(ids), msg=name)
    torch.testing.assert_close(disabled(IDS), llama()(IDS).logits)


def test_scopes_nest() -> None:
    model = attached()
    model.add_adapter("b", softkv.PTuningV2(length=2))
    want = {name: model(IDS, adapter_names=[name]).logits for name in ("default", "b")}
    with model.using("b"):
        assert torch.equal(model(IDS).logits, want["b"])
        with model.using("default"):
            assert torch.equal(model(IDS).logits, want["default"])
            with model.disabled():
                torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)
        model.set_adapter("b")
        assert model.active_adapter == "b"
    assert model.active_adapter == "b", "set_adapter is of the model, using of the block"
    with pytest.raises(ValueError, match="is the active one"):
        model.delete_adapter("b")


def test_an_error_inside_leaves_no_call_behind() -> None:
    model = attached()
    want, bare = model(IDS).logits, llama()(IDS).logits

    def fail(ids: torch.Tensor) -> None:
        raise KeyboardInterrupt

    for way in WAYS:
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, max_new_tokens=2, **WAYS[way](fail))
        torch.testing.assert_close(model.base(IDS).logits, bare)
        assert torch.equal(model(IDS).logits, want)


def test_guidance_by_a_longer_prompt_reads_its_cache() -> None:
    model, negative = attached(), torch.tensor([[11, 12, 13, 14]])
    options: dict[str, Any] = {"negative_prompt_ids": negative, "guidance_scale": 1.7, "max_new_tokens": 3}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, **options, use_cache=False))


def test_a_copied_cache_follows_its_own_rows() -> None:
    model, cache = attached(), transformers.DynamicCache()
    model(IDS.expand(2, -1), past_key_values=cache)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(2)
    assert (len(cache.layers[0].keys), len(copied.layers[0].keys)) == (2, 4)
