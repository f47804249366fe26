"""What the op is besides its numbers: an operator that compiles, computes only what is asked for, and stays small."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from softkv.ops.api import prefix_attention
from softkv.ops.engine import Call, Needs
from tests.attention_cases import CASES, CHUNKS_AND_WIDTHS, LEAVES, Case, dense, index, packed


def operands(case: Case) -> tuple:
    """The case as the forward operator's positional arguments."""
    given: dict = {**dict.fromkeys(Call.__annotations__), "is_causal": True, "window_covers_prefix": False}
    given |= {**case.leaves, **case.options, "scale": case.options.get("scale") or case.leaves["q"].shape[-1] ** -0.5}
    return *(given[name] for name in Call.__annotations__), "torch"


@pytest.mark.parametrize(
    "name",
    [
        "shared prefix",
        "P = 0",
        "no query",
        "everything at once",
        "packed, bank",
        "packed without prefix",
        "packed, wide values, chunks",
        "narrow values",
    ],
)
def test_operators_pass_opcheck(name: str) -> None:
    forward = operands((CASES | CHUNKS_AND_WIDTHS)[name]())
    torch.library.opcheck(torch.ops.softkv.attention.default, forward)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in forward]
    out, lse = torch.ops.softkv.attention(*plain)
    given = dict(zip(Call.__annotations__, plain, strict=False))
    for needs in ([given[name] is not None for name in Needs._fields], [False] * 6):
        backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *plain, needs)
        torch.library.opcheck(torch.ops.softkv.attention_backward.default, backward)


@pytest.mark.parametrize("name", ["everything at once", "packed, bank"])
def test_compiles_to_one_graph(name: str) -> None:
    case = CASES[name]()
    compiled = torch.compile(lambda leaves: Case(leaves, case.options).call(), fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, lambda leaves: Case(leaves, case.options).call()):
        out, lse = call(case.leaves)
        grads = torch.autograd.grad(out.square().sum() + lse.clamp(min=-9).sum(), list(case.leaves.values()))
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results)


ASKED = {
    "the prefix alone": ("prefix_k", "prefix_v"),
    "prefix keys alone": ("prefix_k",),
    "queries alone": ("q",),
    "values alone": ("v",),
    "sinks alone": ("sinks",),
    "all but queries": ("k", "v", "prefix_k", "prefix_v", "sinks"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_subset_of_gradients(asked: str, softcap: float | None) -> None:
    case = dense(P=7, A=1, sinks=True, softcap=softcap)
    everything = case.run()
    case.leaves = {name: x.detach().requires_grad_(name in ASKED[asked]) for name, x in case.leaves.items()}
    out, lse = case.call()
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (out, lse)]
    torch.autograd.backward([out, lse], direction)
    for name in LEAVES:
        if name in ASKED[asked]:
            torch.testing.assert_close(case.leaves[name].grad, everything[name])
        else:
            assert case.leaves[name].grad is None


def test_a_frozen_base_pays_for_the_prefix_only() -> None:
    """Layer 0 of a frozen base asks for the prefix's gradient: no backward over the tokens may run."""
    case = dense(B=2, T=48, P=7, A=1).to(torch.float32)
    for name in ("q", "k", "v"):
        case.leaves[name].requires_grad_(False)
    out, _ = case.call()
    with profile(record_shapes=True) as recorded:
        out.sum().backward()
    kernels = [e for e in recorded.events() if "flash_attention_for_cpu_backward" in e.name]
    assert kernels
    assert {e.input_shapes[2][2] for e in kernels} == {7}


def test_prefix_gradients_are_the_same_bits_every_run() -> None:
    case = dense(B=3, H=6, G=2, T=131, P=70, A=1).to(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (case.run(with_lse=False) for _ in range(4))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert torch.equal(first["prefix_k"], other["prefix_k"])
        assert torch.equal(first["prefix_v"], other["prefix_v"])


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every allocation, in order."""
    with profile(profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


MEMORY = {
    "shared": lambda: dense(B=16, T=16, P=2048, A=1),
    "bank": lambda: dense(B=16, T=16, P=2048, A=2, prefix_index=index(*[0, 1] * 8)),
    "bank in order": lambda: dense(B=16, T=16, P=2048, A=2, prefix_index=index(*[0] * 8, *[1] * 8)),
    "shared, window over it": lambda: dense(B=16, T=16, P=2048, A=1, window=4096, window_covers_prefix=True),
    "packed": lambda: packed([13, 19] * 8, P=2048, A=1),
    "softcap": lambda: dense(B=16, T=16, P=2048, A=1, softcap=5.0),
    "decoding, a ragged cache": lambda: dense(B=16, T=1, S=32, P=2048, A=1, key_lengths=index(*range(16, 32))),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_that_of_the_prefix_not_of_the_batch(name: str) -> None:
    case = MEMORY[name]().to(torch.float32)
    prefix = 4 * case.leaves["prefix_k"].numel()
    copy_per_row = 16 * prefix // case.leaves["prefix_k"].shape[0]
    ours, naive = (allocations(lambda b=backend: case.run(b, with_lse=False)) for backend in (None, "reference"))
    assert max(ours) < copy_per_row / 2  # copies, concatenation, or all scores: each is one of these
    assert sum(ours) < sum(naive) / 4


@pytest.mark.parametrize("backward", [False, True])
def test_no_scores_of_a_long_prefix(backward: bool) -> None:
    """T×P of one head alone is 16 MB here; nothing of that size, nor its sum over tiles, is kept."""
    case = dense(B=1, H=2, G=1, T=1024, P=4096, D=8, A=1).to(torch.float32)

    def step() -> None:
        out, _ = case.call()
        if backward:
            out.sum().backward()

    step()
    assert sum(allocations(step)) < 4 * 1024 * 4096


def test_explicit_backends() -> None:
    case = dense(P=7, A=1)
    torch.testing.assert_close(case.run("torch"), case.run())
    with pytest.raises(
        ValueError, match=r"backend: expected None or one of torch, triton, cudnn, flash, reference, got 'cuda'"
    ):
        case.call(backend="cuda")


def test_no_gradient_no_graph() -> None:
    case = dense(P=7, A=1)
    with torch.no_grad():
        assert not case.call()[0].requires_grad
    with torch.inference_mode():
        out = case.call()[0]
    torch.testing.assert_close(out, case.run()["out"])
    detached = {name: x.detach() for name, x in case.leaves.items()}
    assert not prefix_attention(**detached).requires_grad
