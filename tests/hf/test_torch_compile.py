"""Models with softkv's attention compile wherever sdpa does, in one graph, and no more often."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._dynamo.utils import counters

import softkv
from tests.hf.naive import close
from tests.robustness.models import VOCAB, attached, llama, scatter

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


def packed_by_lengths(model: Any, ids: torch.Tensor) -> torch.Tensor:
    T = ids.shape[1]
    cu = torch.tensor([0, 3, T], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": T - 3, "max_length_k": T - 3}
    positions = torch.cat([torch.arange(3), torch.arange(T - 3)])[None]
    return model(input_ids=ids, position_ids=positions, **lengths, use_cache=False).logits


def placed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


ONE, SEVERAL = [(1, 8), (1, 11)], [(2, 8), (3, 11)]
WAYS: dict[str, tuple[Rows, list[tuple[int, int]]]] = {
    "one row": (plain, ONE),
    "rows": (plain, SEVERAL),
    "one row, with a cache": (with_cache, ONE),
    "padded": (padded, SEVERAL),
    "packed": (packed, ONE),
    "packed by lengths": (packed_by_lengths, ONE),
    "placed": (placed, SEVERAL),
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
     ("padded", "soft prompt"), ("packed", "softkv"), ("packed", "soft prompt"), ("packed by lengths", "soft prompt"),
     ("placed", "soft prompt")],
)  # fmt: skip
def test_one_graph_as_with_sdpa(way: str, attention: str) -> None:
    assert graphs_of(model_with(attention), *WAYS[way]) == 1


METHODS = {
    "after": softkv.PromptTuning(length=2),
    "template": softkv.PTuning(template="[P1][P2][X][Y]", encoder="mlp", encoder_size=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_soft_tokens(method: str) -> None:
    model, ids = attached(METHODS[method]), torch.tensor([[-1, 5, -2, 6, 7], [-1, 8, -2, 9, 10]])
    ids = ids if method == "template" else ids.abs()
    compiled = torch.compile(lambda ids: plain(model, ids), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), plain(model, ids))


def test_packed_rows_that_a_tracer_can_not_tell() -> None:
    model, ids = attached(METHODS["after"]), torch.arange(2, 10)[None]
    with pytest.raises(Exception, match=r"can't read position ids.*give cu_seq_lens_q and max_length_q"):
        torch.compile(lambda ids: packed(model, ids), fullgraph=True, backend="eager")(ids)


@pytest.mark.parametrize("masked", ["mask", "buffer"])
@pytest.mark.parametrize("method", [None, "after"])
def test_decoding_in_a_static_cache(method: str | None, masked: str) -> None:
    """One graph for the first step and one for all others, as with sdpa."""
    model = llama()
    model.set_attn_implementation("softkv")
    if method is not None:
        model = attached(METHODS[method])
    prompt, steps = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.arange(11, 19).view(2, 4)
    real = torch.cat([(prompt > 0).long(), torch.ones_like(steps)], 1)

    def answers(step: Any) -> torch.Tensor:
        cache, logits = transformers.StaticCache(config=llama().config, max_cache_len=16), []
        for begin, end in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]:
            logits.append(
                (step if begin else model)(
                    input_ids=torch.cat([prompt, steps], 1)[:, begin:end],
                    attention_mask=F.pad(real[:, :end], (0, 16 - end if masked == "buffer" else 0)),
                    position_ids=(real.cumsum(1) - 1).clamp(min=0)[:, begin:end],
                    past_key_values=cache,
                ).logits[:, -1:]
            )
        return torch.cat(logits, 1)

    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        got = answers(torch.compile(lambda **given: model(**given), fullgraph=True, backend="eager"))
        torch.testing.assert_close(got, answers(model))
    assert counters["stats"]["unique_graphs"] <= 2
