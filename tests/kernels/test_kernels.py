"""The Triton kernels against the fp64 oracle: outputs, lse, every gradient. Interpreted on CPU, compiled on a GPU."""

import random
from typing import NamedTuple

import pytest
import torch

import softkv.kernels
from tests.attention_cases import CASES, CHUNKS_AND_WIDTHS, Case, dense, index, mask, packed
from tests.kernels.device import DEVICE, on_device

# Hundreds of queries: on a GPU only.
SLOW = ("tiles of queries", "long queries", "chunks of q", "packed, tiles", "chunks that share", "chunks longer than",
        "chunks, many queries, padded")  # fmt: skip


# Shapes that meet the tiles' edges: 32 items own, keys in steps of 32 and 16 (see INTERPRETER in kernels/tiles.py).
TILES = {
    "whole tiles, nothing to mask but the diagonal": lambda: dense(B=1, H=2, G=1, T=32, S=64, P=32, A=1),
    "a tile and one": lambda: dense(B=1, H=2, G=1, T=33, S=65, P=33, A=1),
    "a tile less one": lambda: dense(B=1, H=2, G=1, T=31, S=63, P=31, A=1),
    "groups of three": lambda: dense(B=2, H=6, G=2, T=23, S=40, P=17, A=1),
    "groups of five, MQA": lambda: dense(B=2, H=5, G=1, T=23, S=40, P=70, A=1),
    "D = 96": lambda: dense(B=1, H=2, G=1, T=20, S=33, P=17, A=1, D=96),
    "D = 112": lambda: dense(B=1, H=2, G=1, T=20, S=33, P=17, A=1, D=112),
    "D = 256": lambda: dense(B=1, H=2, G=1, T=20, S=33, P=17, A=1, D=256),
    "D = 40": lambda: dense(B=1, H=2, G=1, T=20, S=33, P=17, A=1, D=40),
    "window cuts both sides of a tile": lambda: dense(B=1, H=2, G=1, T=70, P=5, A=1, window=41),
    "window with whole tiles inside": lambda: dense(B=1, H=2, G=1, T=20, S=150, P=3, A=1, window=90),
    "window, T > S": lambda: dense(B=1, H=2, G=1, T=50, S=20, P=5, A=1, window=7),
    "window over a long prefix": lambda: dense(B=2, H=2, G=1, T=40, P=80, A=1, window=60, window_covers_prefix=True),
    "long prefix, split reduction": lambda: dense(B=4, H=4, G=1, T=40, P=9, A=1),
    "bank, split reduction": lambda: dense(B=4, H=4, G=2, T=40, P=9, A=2, prefix_index=index(1, 1, -1, 1)),
    "bank, out of order, packed": lambda: packed(
        [17, 0, 33, 5], [20, 3, 33, 0], H=6, G=2, A=3, P=21, prefix_index=index(2, 0, 2, 1),
        prefix_lengths=index(21, 4, 18),
    ),
    "bank, packed, window over the prefix": lambda: packed(
        [17, 2, 33, 5], H=6, G=2, A=3, P=21, window=23, window_covers_prefix=True, prefix_index=index(2, 0, 2, -1),
        sinks=True,
    ),
    "negative scale": lambda: dense(P=7, A=1, scale=-0.4),
    "scale of zero": lambda: dense(P=7, A=1, T=20, scale=0.0),
    "long caches, few queries": lambda: dense(B=3, H=4, G=2, T=2, S=150, P=100, A=1, key_lengths=index(150, 0, 77)),
    "cache with padding, window, softcap, sinks": lambda: dense(
        B=2, H=4, G=2, T=3, S=70, P=20, A=2, key_lengths=index(70, 41), window=30, softcap=2.0, sinks=True,
        key_mask=mask("011" * 23 + "1", "1" * 70),
    ),
    "large scores": lambda: large(dense(B=1, H=2, G=1, T=40, P=20, A=1, sinks=True)),
}  # fmt: skip


ALL = CASES | TILES | CHUNKS_AND_WIDTHS
NAMES = [n for n in ALL if DEVICE == "cuda" or not n.startswith(SLOW)]


def large(case: Case) -> Case:
    with torch.no_grad():
        case.leaves["q"] *= 4
    return case


def check(case: Case, dtype: torch.dtype, gradients: bool = True) -> None:
    """Error at most twice that of the oracle computed in `dtype`, plus rounding."""
    low = on_device(case).to(dtype)

    def run(case: Case, backend: str) -> dict[str, torch.Tensor]:
        if gradients:
            return case.run(backend)
        return dict(zip(("out", "lse"), (x.detach() for x in case.call(backend=backend)), strict=True))

    exact, got, peer = run(low.to(torch.float64), "reference"), run(low, "triton"), run(low, "reference")
    for name, want in exact.items():
        assert got[name].shape == want.shape
        assert torch.equal(got[name].isinf(), want.isinf()), name
        if (seen := ~want.isinf()).any():
            error, allowed = ((x[name].double() - want)[seen].abs().amax() for x in (got, peer))
            rounding = 16 * torch.finfo(dtype).eps * max(1.0, want[seen].abs().amax().item())
            assert error <= 2 * allowed + rounding, f"{name}: off by {error:.2e}, the reference by {allowed:.2e}"


def build(name: str) -> Case:
    return ALL[name]()


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softkv.kernels, "MOST_QUERIES", 0)
    check(build(name), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernels know no bound on T; only the choice between them and the forward does."""
    monkeypatch.setattr(softkv.kernels, "MOST_QUERIES", 1 << 30)
    check(build(name), torch.float32, gradients=False)


HALF = ("shared prefix", "D = 80", "bank with a row without prefix", "groups of three", "everything at once",
        "packed, rows of length 0", "window, T > S", "softcap")  # fmt: skip


@pytest.mark.parametrize("name", HALF)
def test_fp16(name: str) -> None:
    check(build(name), torch.float16)


@pytest.mark.filterwarnings("ignore:Triton's interpreter computes bfloat16 incorrectly")
@pytest.mark.parametrize("name", HALF[:4])
def test_bf16(name: str, bf16: None) -> None:
    check(build(name), torch.bfloat16)


class Constants(NamedTuple):
    """What binaries differ by. On a GPU each set is compiled once, so there are few; values are drawn freely."""

    options: dict[str, object]
    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # T, S, P: alike in being 1 or multiples of 16
    G: int = 2
    group: int = 2
    D: int = 16
    A: int = 1
    index: bool = False
    prefix_lengths: bool = False
    key_lengths: bool = False
    key_mask: bool = False
    sinks: bool = False
    window: bool = False
    is_packed: bool = False


ODD = ((3, 7, 19, 33, 37), (5, 21, 39), (7, 21, 33))
SIXTEENS = ((16, 32, 48), (16, 48), (16, 32))
ONE = ((1,), (5, 21, 39), (1, 7, 33))
NO_PREFIX = (ODD[0], (0, *ODD[1]), (0,))
COVERED = {"window_covers_prefix": True}
CONSTANTS = {
    "shared": Constants({}, ODD),
    "sixteens, a prefix a row": Constants({}, SIXTEENS, A=3, group=1),
    "bank": Constants({"is_causal": False}, ODD, A=3, index=True, prefix_lengths=True, key_mask=True, D=24),
    "covered window": Constants(COVERED, ODD, window=True, prefix_lengths=True, key_lengths=True, sinks=True),
    "covered window, bank": Constants(COVERED, ODD, window=True, A=3, index=True, key_mask=True, group=3),
    "window, cap": Constants({"softcap": 2.0}, ODD, window=True, A=3, prefix_lengths=True, sinks=True, G=1),
    "one query": Constants({}, ONE, A=3, index=True, key_lengths=True, sinks=True),
    "one query, window, mask": Constants(COVERED, ONE, window=True, key_lengths=True, key_mask=True, group=3),
    "no prefix": Constants({}, NO_PREFIX, key_lengths=True, key_mask=True, sinks=True),
    "packed": Constants({}, ODD, is_packed=True, group=3),
    "packed bank": Constants({}, ODD, is_packed=True, A=3, index=True, prefix_lengths=True, D=24, sinks=True),
    "packed, covered window": Constants(COVERED, ODD, is_packed=True, window=True, A=3, prefix_lengths=True, G=1),
    "packed, cap": Constants({"softcap": 2.0, "is_causal": False}, ODD, is_packed=True, A=3, index=True),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_random_calls(name: str) -> None:
    """The whole keyword space, small shapes."""
    for number in range(8 if DEVICE == "cuda" else 1):
        check(drawn(CONSTANTS[name], random.Random(f"{name} {number}")), torch.float32)


def drawn(c: Constants, draw: random.Random) -> Case:
    T, S, P = (draw.choice(sizes) for sizes in c.sizes)
    B, A = (3, c.A) if c.A > 1 else (draw.randint(1, 3), 1)

    def integers(low: int, high: int, count: int) -> list[int]:
        return [draw.randint(low, high) for _ in range(count)]

    options: dict[str, object] = dict(c.options)
    if c.window:
        options["window"] = draw.randint(1, 40)
    if c.index:
        options["prefix_index"] = index(*integers(-1, A - 1, B))
    if c.prefix_lengths:
        options["prefix_lengths"] = index(*integers(0, P, A))
    common = {"H": c.G * c.group, "G": c.G, "D": c.D, "sinks": c.sinks, "seed": draw.randint(0, 99)}
    common |= {"A": A, "P": P} if P else {}
    if c.is_packed:
        rows = [integers(0, 40, B) for _ in "qk"]
        for lengths in rows:
            lengths[0] += (sum(lengths) + 1) % 2  # an odd number of tokens
        return packed(*rows, **common, **options)
    if c.key_lengths:
        options["key_lengths"] = index(*integers(0, S, B))
    if c.key_mask:
        seed = torch.Generator().manual_seed(draw.randint(0, 99))
        options["key_mask"] = torch.rand(B, S, generator=seed) > 0.4
    return dense(B=B, T=T, S=S, **common, **options)


def test_what_is_hidden_may_be_nan() -> None:
    """Keys past the length, masked, left of every window, and slots past a prefix's length are never read."""
    case = dense(B=2, T=3, S=70, A=2, P=40, window=9, key_lengths=index(70, 50), prefix_lengths=index(17, 0),
                 key_mask=mask("1" * 69 + "0", "1" * 70))  # fmt: skip
    with torch.no_grad():
        for name in ("k", "v"):
            case.leaves[name][0, :, 69:] = float("nan")
            case.leaves[name][1, :, 50:] = float("nan")
            case.leaves[name][:, :, :36] = float("nan")
        for name in ("prefix_k", "prefix_v"):
            case.leaves[name][0, :, 17:] = float("nan")
            case.leaves[name][1] = float("nan")
    for most in (0, 16):
        softkv.kernels.MOST_QUERIES, before = most, softkv.kernels.MOST_QUERIES
        try:
            got = on_device(case).to(torch.float32).run("triton")
        finally:
            softkv.kernels.MOST_QUERIES = before
        assert not any(x.isnan().any() for x in got.values())


@pytest.mark.parametrize("name", ["shared prefix", "bank, split reduction", "packed, rows of length 0"])
def test_any_layout_gives_the_same_bits(name: str) -> None:
    """Strides are the caller's business: transposed, expanded and sliced tensors are read where they lie."""
    case = on_device(build(name)).to(torch.float32)
    other = {}
    for leaf, x in case.leaves.items():
        wide = x.detach().repeat_interleave(2, 0)[::2]
        other[leaf] = (wide if leaf == "sinks" else torch.cat([wide, wide], -1)[..., : x.shape[-1]]).requires_grad_()
    first, second = case.run("triton"), Case(other, case.options).run("triton")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_gradients_are_the_same_bits_every_time() -> None:
    case = on_device(build("bank, split reduction")).to(torch.float32)
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_short_row_reads_nothing_past_its_keys() -> None:
    """Blocks of items past the end of a row, which the longest row needs: the interpreter's products would overflow."""
    case = packed([16, 1], [16, 24], H=2, G=1, D=16).to(torch.float32)
    with torch.no_grad():
        wide = {n: torch.cat([case.leaves[n], torch.full((64, 1, 16), 3e38)]) for n in ("k", "v")}
    leaves = {n: wide[n][:40].detach().requires_grad_() if n in wide else x for n, x in case.leaves.items()}
    check(Case(leaves, case.options), torch.float32)
