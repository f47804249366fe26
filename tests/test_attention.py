"""The op against its oracle: outputs and every gradient, on every named case and on drawn ones."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softkv.ops.api import prefix_attention, prefix_attention_varlen
from softkv.ops.torch import small
from tests.attention_cases import CASES, CHUNKS_AND_WIDTHS, COUNTED_CHUNKS, Case, dense, index, mask, packed

ALL_CASES = CASES | CHUNKS_AND_WIDTHS | COUNTED_CHUNKS


def assert_matches(got: dict, want: dict, tolerance: float) -> None:
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name].double(), expected.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "out"])  # a gradient of lse takes another path
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
def test_matches_the_oracle(name: str, dtype: torch.dtype, tolerance: float, with_lse: bool) -> None:
    case = ALL_CASES[name]()
    assert_matches(case.to(dtype).run(with_lse=with_lse), case.run("reference", with_lse=with_lse), tolerance)


SMALL = {
    "one prefix": dense(P=3, A=1),
    "tokens see what follows": dense(P=3, A=1, is_causal=False),
    "more keys than queries": dense(T=3, S=8, P=2, A=1),
    "more queries than keys": dense(T=8, S=3, P=2, A=1),
    "one query": dense(T=1, S=7, P=2, A=1),
    "one row": dense(B=1, P=3, A=1),
    "a prefix for each row": dense(P=3, A=2),
    "whole vectors of keys": dense(T=12, S=12, P=4, A=1),
    "no keys": dense(T=3, S=0, P=3, A=1),
    "packed": packed([3, 0, 5, 1], P=2, A=1),
    "packed, tokens see what follows": packed([3, 4], P=2, A=1, is_causal=False),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_calls_are_the_same_in_one_piece_and_in_several(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, used = SMALL[name], Counter[str]()
    if case.packed:  # of one and the same lengths, which are then one tensor
        case.options["cu_seqlens_k"] = case.options["cu_seqlens_q"]
    for pass_ in ("forward", "backward"):
        function = getattr(small, pass_)

        def counted(*args: Any, pass_: str = pass_, function: Any = function) -> Any:
            used[pass_] += 1
            return function(*args)

        monkeypatch.setattr(small, pass_, counted)
    want = case.run("reference", with_lse=False)
    assert_matches(case.run(with_lse=False), want, 1e-11)
    assert used == {"forward": 2, "backward": 1}  # of which one forward finds directions
    monkeypatch.setattr(small, "MOST", -1)
    assert_matches(case.run(with_lse=False), want, 1e-11)
    assert used == {"forward": 2, "backward": 1}


@pytest.mark.parametrize("name", SMALL)
def test_small_calls_whose_out_alone_is_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, taken = SMALL[name], []
    short = small.with_gradients
    monkeypatch.setattr(small, "with_gradients", lambda call: taken.append(short(call)) or taken[-1])
    if case.packed:
        case.options["cu_seqlens_k"] = case.options["cu_seqlens_q"]
    op: Any = prefix_attention_varlen if case.packed else prefix_attention
    results = []
    for backend in (None, "reference"):
        out = op(**case.leaves, **case.options, backend=backend)
        direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad(out, list(case.leaves.values()), direction, create_graph=True)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    assert len(taken) == 1
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        sum(grad.sum() for grad in results[0][1:]).backward()


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_twice_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = ALL_CASES[name]().to(dtype)
    exact = case.to(torch.float64).run("reference", with_lse=False)
    plain, ours = case.run("reference", with_lse=False), case.run(with_lse=False)
    for key, want in exact.items():
        finite = want.isfinite()
        assert torch.equal(ours[key].isfinite(), finite), key
        if finite.any():
            errors = [(x[key].double() - want)[finite].abs().max() for x in (ours, plain)]
            rounding = torch.finfo(dtype).eps * want[finite].abs().max()
            assert errors[0] <= 2 * errors[1] + rounding, key


def test_lse_has_at_least_single_precision() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        _, lse = CASES["shared prefix"]().to(dtype).call()
        assert lse.dtype == wanted


def _fused(x: torch.Tensor) -> torch.Tensor:
    """A view into a larger tensor, as a fused projection leaves it."""
    wide = torch.cat([x.transpose(1, 2)] * 2, dim=-1)
    return wide[..., : x.shape[-1]].transpose(1, 2)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "token by token": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a fused projection": _fused,
    "head dim not last in memory": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one row repeated": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["shared prefix", "one query", "tiles of queries", "everything at once"])
def test_any_layout(layout: str, name: str) -> None:
    case = CASES[name]()
    case.leaves = {
        n: (LAYOUTS[layout](x.detach()) if x.dim() == 4 else x.detach()).requires_grad_()
        for n, x in case.leaves.items()
    }
    result, q = case.run(), case.leaves["q"]
    assert_matches(result, case.run("reference"), 1e-11)
    if q.stride(-1) == 1 and q.shape[2] > 1:
        assert result["out"].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("name", ["shared prefix", "packed", "tiles of queries"])
def test_gradient_of_a_sum_has_no_strides(name: str) -> None:
    case = CASES[name]()
    results = []
    for backend in (None, "reference"):
        out, _ = case.call(backend=backend)
        results.append(dict(zip(case.leaves, torch.autograd.grad(out.sum(), list(case.leaves.values())), strict=True)))
    assert_matches(*results, 1e-11)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    """Also where nothing is seen: out 0, lse −∞."""
    case = CASES["sinks where nothing is seen"]()
    with torch.no_grad():
        case.leaves["sinks"].fill_(float("-inf"))
    got, want = case.run(), CASES["T > S without prefix: out 0, lse −inf"]().run()
    assert got.pop("sinks").eq(0).all()
    assert_matches(got, want, 1e-11)


def test_a_gradient_of_lse_alone() -> None:
    case = CASES["sinks"]()
    results = []
    for backend in (None, "reference"):
        _, lse = case.call(backend=backend)
        leaves = [x for n, x in case.leaves.items() if n not in ("v", "prefix_v")]
        results.append(dict(enumerate(torch.autograd.grad(lse.square().sum(), leaves))))
    assert_matches(*results, 1e-11)


def test_padding_moves_nothing() -> None:
    """A row alone and the same row left-padded beside a longer one: equal, also under a window over the prefix."""
    alone = dense(B=1, T=4, P=7, A=1, window=6, window_covers_prefix=True)
    keep = torch.tensor([[False] * 3 + [True] * 4])
    padded = {n: torch.nn.functional.pad(alone.leaves[n], (0, 0, 3, 0), value=9.0) for n in ("q", "k", "v")}
    out, _ = Case(alone.leaves | padded, alone.options | {"key_mask": keep}).call()
    torch.testing.assert_close(out[:, :, 3:], alone.call()[0])


HIDING = {
    "part-filled cache": lambda T: dense(B=3, T=T, S=T + 4, P=3, A=1, key_lengths=index(T + 1, T + 4, 0)),
    "padding with holes": lambda T: dense(
        T=T, P=3, A=1, key_mask=mask("0" * (T // 2) + "1" * (T - T // 2), "1" * (T // 3) + "0" + "1" * (T - T // 3 - 1))
    ),
    "ragged rows": lambda T: dense(B=3, T=T, P=7, prefix_lengths=index(7, 2, 0)),
    "ragged bank": lambda T: dense(
        B=3, T=T, A=2, P=7, prefix_index=index(0, -1, 1), prefix_lengths=index(4, 7), softcap=2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("T", [1, 5, 40])  # few queries get a mask, more get slices
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "out"])
def test_what_no_query_sees_may_hold_anything(name: str, T: int, with_lse: bool) -> None:
    case = HIDING[name](T)
    want = case.run("reference", with_lse=with_lse)
    lengths, slots = case.options.get("key_lengths"), case.options.get("prefix_lengths")
    with torch.no_grad():
        for kind in ("k", "v"):
            keys = case.leaves[kind].transpose(1, 2)
            if "key_mask" in case.options:
                keys[~case.options["key_mask"]] = float("nan")
            if lengths is not None:
                keys[torch.arange(keys.shape[1]) >= lengths[:, None]] = float("inf")
            if slots is not None:
                prefix = case.leaves[f"prefix_{kind}"].transpose(1, 2)
                prefix[torch.arange(prefix.shape[1]) >= slots[:, None]] = float("nan")
    assert_matches(case.run(with_lse=with_lse), want, 1e-11)


def test_packed_rows_equal_dense_rows() -> None:
    rows = dense(B=3, T=6, P=5, A=1)
    line = {n: x.transpose(1, 2).flatten(0, 1) for n, x in rows.leaves.items() if n in "qkv"}
    ends = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    out = prefix_attention_varlen(
        *line.values(), ends, ends, 6, 6, rows.leaves["prefix_k"], rows.leaves["prefix_v"]
    )  # fmt: skip
    torch.testing.assert_close(out.unflatten(0, (3, 6)).transpose(1, 2), rows.call()[0])


def test_a_prefix_equals_the_same_keys_in_front() -> None:
    case = dense(T=6, P=5)
    joined = [torch.cat([case.leaves[f"prefix_{n}"], case.leaves[n]], 2) for n in "kv"]
    torch.testing.assert_close(prefix_attention(case.leaves["q"], *joined), case.call()[0])


def _integers(low: int, high: int, size: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.integers(low, high), min_size=size, max_size=size).map(
        lambda x: torch.tensor(x, dtype=torch.int32)
    )


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """Any combination of keywords on small shapes, some of them past the limits where the engine changes its ways."""
    G, D = draw(st.integers(1, 2)), draw(st.sampled_from([1, 8, 20]))
    H = G * draw(st.integers(1, 3))
    few, many = st.integers(0, 6), st.integers(33, 80)
    rows = draw(st.integers(1, 4))
    causal = draw(st.booleans())
    options: dict = {
        "is_causal": causal,
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "scale": draw(st.sampled_from([None, 0.5])),
        "window": draw(st.none() | st.integers(1, 12) | st.integers(40, 90)) if causal else None,
        "window_covers_prefix": draw(st.booleans()),
    }
    if causal and options["window"] is None:
        options["chunk"] = draw(st.none() | st.integers(1, 12) | st.integers(20, 60))
    P = draw(st.integers(0, 9))
    A = draw(st.sampled_from([1, rows, 3]))
    if A not in (1, rows) or draw(st.booleans()):
        options["prefix_index"] = draw(_integers(-1, A - 1, rows))
    if draw(st.booleans()):
        options["prefix_lengths"] = draw(_integers(0, P, A))
    shape = {
        "H": H,
        "G": G,
        "D": D,
        "Dv": draw(st.sampled_from([D, D, 12])),
        "A": A,
        "P": P,
        "sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }
    length = few | many
    if draw(st.booleans()):
        lengths_q = draw(st.lists(length, min_size=rows, max_size=rows))
        lengths_k = draw(st.none() | st.lists(length, min_size=rows, max_size=rows))
        return packed(lengths_q, lengths_k, **shape, **options)
    T = draw(length)
    S = draw(st.just(T) | length)
    if draw(st.booleans()):
        options["key_lengths"] = draw(_integers(0, S, rows))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        options["key_mask"] = torch.rand(rows, S, generator=generator) < draw(st.sampled_from([0.2, 0.8, 1.0]))
    return dense(B=rows, T=T, S=S, **shape, **options)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=calls(), with_lse=st.booleans())
def test_drawn_calls_match_the_oracle(case: Case, with_lse: bool) -> None:
    assert_matches(case.run(with_lse=with_lse), case.run("reference", with_lse=with_lse), 1e-10)
