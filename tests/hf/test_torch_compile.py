"""Models with softkv's attention compile wherever sdpa does, in one graph, and no more often."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import softkv
from tests.hf.naive import close
from tests.robustness.models import VOCAB, llama, scatter

Rows = Callable[[Any, torch.Tensor], torch.Tensor]


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def with_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=transformers.DynamicCache()).logits


def padded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 2:]


def packed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([torch.arange(3), torch.arange(ids.shape[1] - 3)])[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


ONE, SEVERAL = [(1, 8), (1, 11)], [(2, 8), (3, 11)]
WAYS: dict[str, tuple[Rows, list[tuple[int, int]]]] = {
    "one row": (plain, ONE),
    "rows": (plain, SEVERAL),
    "one row, with a cache": (with_cache, ONE),
    "padded": (padded, SEVERAL),
    "packed": (packed, ONE),
}


def model_with(attention: str) -> Any:
    model = llama()
    if attention == "soft prompt":
        model = softkv.attach(model, softkv.PTuningV2(length=3)).eval()
        scatter(model)
    else:
        model.set_attn_implementation(attention)
    return model


def graphs_of(model: Any, way: Rows, shapes: list[tuple[int, int]]) -> int:
    """How many graphs a run over shapes takes, whose answers and gradients are those of eager mode."""
    torch.compiler.reset()
    counters.clear()
    learned = model.adapters if isinstance(model, softkv.SoftModel) else model
    compiled = torch.compile(lambda ids: way(model, ids), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in shapes:
        ids = torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(shape[1]))
        found = []
        for call in (compiled, lambda ids: way(model, ids)):
            logits = call(ids)
            found.append([logits, *torch.autograd.grad(logits.square().mean(), list(learned.parameters()))])
        for got, want in zip(*found, strict=True):
            close(got, want, 1e-4)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "attention"),
    [("one row", "softkv"), ("one row", "soft prompt"), ("one row, with a cache", "soft prompt"), ("rows", "softkv"),
     ("padded", "soft prompt"), ("packed", "softkv")],
)  # fmt: skip
def test_one_graph_as_with_sdpa(way: str, attention: str) -> None:
    assert graphs_of(model_with(attention), *WAYS[way]) == 1
