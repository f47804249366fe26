"""The Triton kernels against the fp64 oracle: outputs, lse and every gradient. Interpreted on CPU, compiled on a GPU."""

import pytest
import torch

import softkv.kernels
from tests.attention_cases import CASES, Case, dense, index, mask, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = ("tiles of queries", "long queries", "chunks", "packed, tiles")  # hundreds of queries: on a GPU only
PATHS = {"forward": 0, "decode": 1 << 30}  # rows of up to so many queries go to the decode kernels


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
    "window, T > S": lambda: dense(B=1, H=2, G=1, T=50, S=20, P=5, A=1, window=7),
    "window over a long prefix": lambda: dense(B=2, H=2, G=1, T=40, P=80, A=1, window=60, window_covers_prefix=True),
    "long prefix, split reduction": lambda: dense(B=4, H=4, G=1, T=40, P=9, A=1),
    "bank, split reduction": lambda: dense(B=4, H=4, G=2, T=40, P=9, A=2, prefix_index=index(1, 1, -1, 1)),
    "bank, out of order, packed": lambda: packed(
        [17, 0, 33, 5], [20, 3, 33, 0], H=6, G=2, A=3, P=21, prefix_index=index(2, 0, 2, 1), prefix_lengths=index(21, 4, 18)
    ),
    "bank, packed, window over the prefix": lambda: packed(
        [17, 2, 33, 5], H=6, G=2, A=3, P=21, window=23, window_covers_prefix=True, prefix_index=index(2, 0, 2, -1), sinks=True
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


NAMES = [n for n in (*CASES, *TILES) if DEVICE == "cuda" or not n.startswith(SLOW)]


def large(case: Case) -> Case:
    with torch.no_grad():
        case.leaves["q"] *= 8
    return case


def on_device(case: Case) -> Case:
    leaves = {name: x.detach().to(DEVICE).requires_grad_() for name, x in case.leaves.items()}
    return Case(leaves, {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in case.options.items()})


def check(case: Case, dtype: torch.dtype) -> None:
    """Error at most twice that of the oracle computed in `dtype`, plus rounding."""
    case = on_device(case)
    low = case.to(dtype)
    exact = low.to(torch.float64).run("reference")
    got, peer = low.run("triton"), low.run("reference")
    for name, want in exact.items():
        assert got[name].shape == want.shape
        assert torch.equal(got[name].isinf(), want.isinf()), name
        seen = ~want.isinf()
        error = (got[name].double() - want)[seen].abs().amax() if seen.any() else torch.tensor(0.0)
        allowed = (peer[name].double() - want)[seen].abs().amax() if seen.any() else torch.tensor(0.0)
        rounding = 8 * torch.finfo(dtype).eps * max(1.0, want[seen].abs().amax().item() if seen.any() else 0.0)
        assert error <= 2 * allowed + rounding, f"{name}: off by {error:.2e}, the reference by {allowed:.2e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_oracle(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softkv.kernels, "MOST_QUERIES", PATHS[path])
    check((TILES.get(name) or CASES[name])(), torch.float32)
