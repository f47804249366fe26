"""What the op is besides its numbers: an operator that compiles, computes only what is asked for, and stays small."""

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

import softkv.ops
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


def drawn(seed: int) -> Case:
    """Any set of options, of few shapes."""
    draw = random.Random(seed)
    causal, rows = draw.random() < 0.7, 3
    options: dict[str, Any] = {
        "is_causal": causal,
        "scale": draw.choice([None, 0.5, 0.3, 1]),
        "softcap": draw.choice([None, 2.0, 3]),
        "window_covers_prefix": draw.random() < 0.5,
    }
    if causal:
        options |= draw.choice([{}, {"window": draw.randint(1, 9)}, {"chunk": draw.randint(1, 6)}])
    A, P = draw.choice([1, rows]), draw.choice([0, 4, 9])
    if draw.random() < 0.5:
        options["prefix_index"] = index(*(draw.randrange(-1, A) for _ in range(rows)))
    if draw.random() < 0.3:
        options["prefix_lengths"] = index(*(draw.randint(0, P) for _ in range(A)))
    shape = {"A": A, "P": P, "D": 8, "Dv": draw.choice([8, 8, 12]), "sinks": draw.random() < 0.3, "seed": seed}
    if draw.random() < 0.4:
        return packed([draw.randint(0, 9) for _ in range(rows)], **shape, **options)
    T = draw.choice([1, 5, 12])
    S = draw.choice([T, T + 4])
    if draw.random() < 0.3:
        options["key_lengths"] = index(*(draw.randint(0, S) for _ in range(rows)))
    if draw.random() < 0.3:
        options["key_mask"] = torch.tensor([[draw.random() < 0.8 for _ in range(S)] for _ in range(rows)])
    return dense(B=rows, T=T, S=S, **shape, **options)


@pytest.mark.parametrize("dynamic", [True, None])
def test_drawn_calls_compile_to_one_graph(dynamic: bool | None) -> None:
    for seed in range(8 if dynamic else 4):
        torch.compiler.reset()
        case = drawn(seed)
        run = torch.compile(_compiled_call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same(case, run)


def _compiled_call(leaves: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return Case(leaves, options).call()


def assert_same(case: Case, run: Callable[..., Any]) -> None:
    leaves = list(case.leaves.values())
    results = []
    for call in (run, _compiled_call):
        out, lse = call(case.leaves, case.options)
        grads = torch.autograd.grad(out.square().sum() + lse.clamp(min=-9).sum(), leaves)
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_again_as_numbers_change(dynamic: bool | None) -> None:
    torch.compiler.reset()
    run = torch.compile(_compiled_call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T, scale, softcap in ((4, 0.5, 2.0), (5, 0.25, 3.0), (6, 1, 3.5)):
        assert_same(dense(T=T, P=T + 1, A=1, scale=scale, softcap=softcap, window=T - 1), run)


def test_sizes_windows_and_chunks_are_compiled_once() -> None:
    for option in ("window", "chunk"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(_compiled_call, fullgraph=True, dynamic=True, backend="aot_eager")
        for T in (7, 9, 11):  # unlike every other size, which would be taken for one
            assert_same(dense(T=T, P=T + 1, A=1, **{option: T - 1}), run)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


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


def peak(run: Callable[[], object]) -> int:
    """Most bytes at once."""
    with profile(profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


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


@pytest.mark.parametrize("name", ["everything at once", "tiles of queries, T > S", "packed, bank", "chunks, padded"])
def test_the_oracle_in_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (CASES | CHUNKS_AND_WIDTHS)[name]()
    whole = case.run("reference")
    monkeypatch.setattr("softkv.ops.reference._MOST_SCORES", 64)
    for key, got in case.run("reference").items():
        torch.testing.assert_close(got, whole[key], rtol=1e-12, atol=1e-12)


def test_the_oracle_keeps_no_more_than_a_slice() -> None:
    case = dense(B=2, H=4, G=2, T=1024, P=64, A=1, D=8).to(torch.float32)
    scores = 4 * 2 * 4 * 1024 * 1088
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softkv.ops.reference._MOST_SCORES", scores // 4 // 32)
        assert peak(lambda: case.run("reference")) < scores / 3
    assert peak(lambda: case.run("reference")) > scores


def test_imports_lead_from_the_functions_to_the_engines() -> None:
    """api → checks, operator, reference → engine; engines know the contract and themselves."""
    allowed = {
        "api": {"checks", "choice", "engine", "operator", "reference"}, "checks": {"engine"}, "choice": {"engine"},
        "engine": set(), "library": {"engine", "library"}, "operator": {"engine"}, "reference": set(),
        "torch": {"engine", "torch"},
    }  # fmt: skip
    folder = Path(softkv.ops.__path__[0])
    for file in folder.rglob("*.py"):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        imports = re.findall(r"^ *(?:from|import) softkv\.ops(?:\.(\w+))?(?: import (.*))?", file.read_text(), re.M)
        names = {name for module, some in imports for name in ([module] if module else some.split(", "))}
        assert names <= allowed.get(own, set()), file
