"""What launchers launch, seen without running anything: on meta tensors, whose values nobody can read."""

from types import SimpleNamespace

import pytest
import torch

import softkv.kernels
from softkv.kernels.launch import recording, target_of
from softkv.kernels.tiles import CAPPED, TABLE, block_d, tile
from softkv.profiling.compile import TARGETS, CallKind, label, name_of, record
from tests.attention_cases import CASES

KEYWORDS = dict.fromkeys(
    ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
     "max_seqlen_k", "window", "softcap", "sinks")
) | {"scale": 0.1, "is_causal": True, "window_covers_prefix": False}  # fmt: skip


def names(case: CallKind) -> list[str]:
    return [label(x) for x in record(case, "sm_90", 64, torch.bfloat16)]


def test_forward_is_one_launch_and_backward_at_most_four() -> None:
    assert names(CallKind("dense")) == ["forward", "prepare", "dq", "dkv", "add_parts"]
    assert names(CallKind("no prefix", P=0)) == ["forward", "prepare", "dq", "dkv"]
    assert names(CallKind("prefixes that fill the device", P=2048, A=4)) == ["forward", "prepare", "dq", "dkv"]


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (CallKind("shared prefix, read once for the batch", T=1, P=4096), ["decode", "merge"]),
        (CallKind("long cache", T=1, P=0, S=4096), ["decode", "merge"]),
        (CallKind("everything is short", T=1, P=64, S=64), ["forward"]),
        (CallKind("short, no prefix", T=1, P=0, S=64), ["forward"]),
        (CallKind("a prefix a row", T=1, P=64, S=64, A=4), ["forward"]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_decoding_is_two_launches_or_one(case: CallKind, launches: list[str]) -> None:
    assert names(case) == launches


def test_a_gradient_nobody_asked_for_is_not_computed() -> None:
    """With a frozen base, layer 0 asks for dPrefix only: no pass over T × S."""
    only_prefix = names(CallKind("dPrefix only", prefix_only=True))
    assert only_prefix == ["forward", "prepare", "dkv over the prefix", "add_parts"]


@pytest.mark.parametrize("prefix_only", [False, True])
@pytest.mark.parametrize("P", [16, 128, 4096])
def test_workspace_does_not_grow_with_the_batch(P: int, prefix_only: bool) -> None:
    """fp32 partial sums: splits·G·P·D, and no more splits than fill the device."""
    for T in (128, 8192):
        launches = record(CallKind("x", T=T, S=T, P=P, prefix_only=prefix_only), "sm_90", 64, torch.bfloat16)
        launch = next(x for x in launches if x.arguments.get("OVER_PREFIX"))
        blocks = -(-P // launch.arguments["PREFIX_N"]) * 8
        assert launch.arguments["parts"] <= max(1, 2 * 132 // blocks)
        assert launch.arguments["prefix_programs"] == blocks * launch.arguments["parts"]
        token_programs = 0 if prefix_only else -(-T // launch.arguments["BLOCK_N"]) * 8 * 4
        assert launch.grid == launch.arguments["prefix_programs"] + token_programs


@pytest.mark.parametrize("name", CASES)
def test_launching_reads_no_value(name: str) -> None:
    """No host sync and no data-dependent Python: every launch can be prepared from shapes alone."""
    case = CASES[name]()
    if not case.leaves["q"].numel() or (case.leaves.get("prefix_k", torch.ones(1)).numel() == 0):
        pytest.skip("the public op answers this itself")
    leaves = {n: x.detach().half().to("meta") for n, x in case.leaves.items()}
    options = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in case.options.items()}
    keywords = KEYWORDS | {"sinks": leaves.pop("sinks", None)} | options
    q, k, v, prefix_k, prefix_v = (leaves.get(n) for n in ("q", "k", "v", "prefix_k", "prefix_v"))
    with recording(TARGETS["sm_90"][1]) as launches:
        out, lse = softkv.kernels.forward(q, k, v, prefix_k, prefix_v, **keywords)
        softkv.kernels.backward(out, lse, out, lse, q, k, v, prefix_k, prefix_v, needs=(True,) * 6, **keywords)
    assert launches
    assert out.shape == q.shape
    assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("target", TARGETS)
def test_every_head_dim_has_a_row(target: str) -> None:
    for head_dim in (8, 16, 64, 80, 96, 112, 128, 192, 256):
        for name in {name for name, _ in TABLE} | {"dkv_prefix"}:
            row = tile(name, TARGETS[target][1], head_dim, torch.bfloat16)
            assert row.why
            assert block_d(head_dim) >= max(16, head_dim)


@pytest.mark.parametrize(("capability", "row"), [(80, 80), (86, 120), (89, 120), (90, 90), (103, 100), (121, 120)])
def test_a_device_takes_the_tiles_that_fit_it(capability: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8.6 and 8.9 have 99 KiB of shared memory a program, where 8.0 has 163."""
    properties = SimpleNamespace(major=capability // 10, minor=capability % 10, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert target_of(SimpleNamespace(device=torch.device("cuda"))) == (f"sm_{row}", 7)


def test_a_soft_cap_has_rows_of_its_own() -> None:
    for (name, target, head_dim), row in CAPPED.items():
        assert tile(name, TARGETS[target][1], head_dim, torch.bfloat16) != row
        used = {name_of(x): x.tile for x in record(CallKind("capped", softcap=30.0), target, head_dim, torch.bfloat16)}
        assert used[name] == row


def test_what_the_kernels_do_not_take_is_refused() -> None:
    for dtype, D in ((torch.float64, 64), (torch.float16, 320)):
        x = torch.zeros(1, 1, 1, D, dtype=dtype)
        with pytest.raises(NotImplementedError, match="triton"):
            softkv.kernels.forward(x, x, x, None, None, **KEYWORDS)
    x = torch.empty_strided((1, 1, 2, 16), (0, 0, 1 << 24, 1), dtype=torch.float16, device="meta")
    with pytest.raises(NotImplementedError, match="tokens of k less than 16777216 elements apart"):
        softkv.kernels.forward(x, x, x, None, None, **KEYWORDS)
