"""`cache_implementation="static"` compiles decoding once: further calls of `generate` compile nothing."""

from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import softkv
from tests.robustness.models import VOCAB, llama, scatter

METHODS = {
    "prefix": softkv.PTuningV2(length=3),
    "head": softkv.PromptTuning(length=2, position="before"),
    "after": softkv.PromptTuning(length=2),
}


def prompts(seed: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : 1 + seed % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compiled_generation(model: Any, calls: list[dict[str, Any]]) -> list[int]:
    """Graphs compiled until the end of each call, whose tokens are those of a growing cache."""
    torch.compiler.reset()
    counters.clear()
    config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    found = []
    for call in calls:
        options = call | {"max_new_tokens": 5, "do_sample": False}
        got = model.generate(**options, cache_implementation="static", compile_config=config)
        found.append(counters["stats"]["unique_graphs"])
        assert torch.equal(got, model.generate(**options))
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "left padding"])
@pytest.mark.parametrize("method", METHODS)
def test_one_compilation_serves_further_calls(method: str, padded: bool) -> None:
    model = softkv.attach(llama(), METHODS[method]).eval()
    scatter(model)
    first, *others = compiled_generation(model, [prompts(seed, padded) for seed in range(3)])
    assert first > 0
    assert others == [first] * 2


def test_banks_of_adapters() -> None:
    model = softkv.attach(llama(), METHODS["prefix"]).eval()
    model.add_adapter("other", softkv.PTuningV2(length=5))
    scatter(model)
    orders = ["default", "other"], ["other", "default"], ["default", "other"]
    calls = [prompts(seed, padded=True) | {"adapter_names": names} for seed, names in enumerate(orders)]
    first, *others = compiled_generation(model, calls)
    assert first > 0
    assert others == [first] * 2
