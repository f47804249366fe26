"""Compile any kernel for any target, without a GPU.

The launchers are called on meta tensors inside `recording()`, so that exactly what would be launched is compiled: the
same signature, the same specialisation of strides and pointers, the same tile. Each binary is then analysed
(`softkv.profiling.sass`): registers, spills, shared memory, occupancy, matrix instructions, hot loops.

It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

import softkv.kernels as engine
from softkv.kernels.launch import Recorded, recording
from softkv.kernels.tiles import Target, block_d
from softkv.profiling.instructions import MATRIX, SELECT, SPILL
from softkv.profiling.sass import analyse

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Target("sm_80", 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Target("sm_90", 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Target("sm_100", 148)),
    "sm_120": (GPUTarget("cuda", 120, 32), Target("sm_120", 170)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("gfx942", 304)),
}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


def specialise(kernel: Any, arguments: dict[str, Any], target: str) -> ASTSource:
    """The source as the JIT would specialise it: None and 1 are constants, and addresses and strides divisible by 16
    are marked, as are, on AMD, tensors within 2 GB (whose loads need no 64-bit addresses)."""
    backend = make_backend(TARGETS[target][0])
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    parameters = {p.name: p for p in kernel.params}

    def walk(value: Any, path: tuple[int, ...], specialised: bool) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(walk(x, (*path, i), True) for i, x in enumerate(value)))
        if isinstance(value, Tensor):
            attributes[path] = backend.parse_attr(backend.get_tensor_specialization(value, align=True))
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or isinstance(value, bool) or (specialised and value == 1):
            constants[path] = value
            return "constexpr"
        if specialised and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, name in enumerate(kernel.arg_names):
        if parameters[name].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", arguments[name]
        else:
            signature[name] = walk(arguments[name], (i,), not parameters[name].do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes)


def build(launch: Recorded, target: str) -> Any:
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, "enable_fp_fusion": True}
    source = specialise(launch.kernel, launch.arguments, target)
    return triton.compile(source, target=TARGETS[target][0], options=options)


@dataclass(frozen=True)
class CallKind:
    """The properties of a call of the op that affect binaries."""

    name: str
    T: int = 2048
    S: int = 2048
    P: int = 128
    A: int = 1
    group: int = 4
    packed: bool = False
    causal: bool = True
    bank: bool = False
    window: int | None = None
    covers: bool = False
    softcap: float | None = None
    sinks: bool = False
    key_mask: bool = False
    key_lengths: bool = False
    prefix_only: bool = False  # gradients of a frozen base's first layer


COMMON = (
    CallKind("causal, shared prefix"),
    CallKind("decode, shared prefix", T=1, key_lengths=True),
)
TRAINER = (CallKind("packed, shared prefix", packed=True),)
OTHERS = (
    CallKind("no prefix", P=0),
    CallKind("padding mask, not causal", key_mask=True, causal=False, group=1),
    CallKind("padding mask, part-filled cache", key_mask=True, key_lengths=True, group=3),
    CallKind("packed, bank", packed=True, A=8, bank=True),
    CallKind("window over the prefix", window=512, covers=True),
    CallKind("window, sinks, group of 8", window=128, sinks=True, group=8),
    CallKind("soft cap, packed", softcap=50.0, packed=True, group=2),
    CallKind("decode, bank", T=1, A=8, bank=True),
    CallKind("decode, packed, sinks, window", T=4, packed=True, window=512, sinks=True, group=8),
)


def record(case: CallKind, target: str, head_dim: int, dtype: torch.dtype) -> list[Recorded]:
    """All launches of forward and backward for a case."""
    B, G, D = 4, 8, head_dim
    H = G * case.group
    meta = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    lengths = meta(B, dtype=torch.int32)
    if case.packed:
        q, k, v = meta(B * case.T, H, D), meta(B * case.S, G, D), meta(B * case.S, G, D)
        cu = meta(B + 1, dtype=torch.int32)
    else:
        q = meta(B, case.T, H, D).transpose(1, 2)
        k, v = (meta(B, case.S, G, D).transpose(1, 2) for _ in range(2))
        cu = None
    prefix = (None, None) if case.P == 0 else (meta(case.A, G, case.P, D), meta(case.A, G, case.P, D))
    options = dict(  # noqa: C408
        prefix_index=lengths if case.bank else None,
        prefix_lengths=meta(case.A, dtype=torch.int32) if case.bank else None,
        key_mask=meta(B, case.S, dtype=torch.bool) if case.key_mask else None,
        key_lengths=lengths if case.key_lengths else None, cu_seqlens_q=cu, cu_seqlens_k=cu,
        max_seqlen_q=case.T if case.packed else None, max_seqlen_k=case.S if case.packed else None,
        sinks=meta(H) if case.sinks else None, scale=D**-0.5, is_causal=case.causal, window=case.window,
        window_covers_prefix=case.covers, softcap=case.softcap,
    )  # fmt: skip
    with recording(TARGETS[target][1]) as launches:
        out, lse = engine.forward(q, k, v, *prefix, **options)
        if case.T > 1 and not (case.packed and case.T < 16):
            needs = (False, False, False, True, True, False) if case.prefix_only else (True,) * 6
            engine.backward(out, lse, out, lse, q, k, v, *prefix, needs=needs, **options)
    return launches


PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "decode": 2}  # matrix products per tile step
MATRIX_PASSES = tuple(PRODUCTS)


def name_of(launch: Recorded) -> str:
    return launch.kernel.__name__.removesuffix("_kernel")


def label(launch: Recorded) -> str:
    return name_of(launch) + (" over the prefix" if launch.arguments.get("OVER_TOKENS") is False else "")


def judge(launch: Recorded, target: str, head_dim: int) -> dict[str, Any]:
    """Compile one launch and analyse the binary.

    `work`: matrix products done for each one needed, if one program computes a tile; bounds count the needed ones."""
    began = time.perf_counter()
    compiled = build(launch, target)
    seconds = time.perf_counter() - began
    report, kernel = analyse(compiled, target), name_of(launch)
    if target == "sm_100" and kernel in PRODUCTS:  # the binary does not contain UTCHMMA's shape
        for loop in report.loops:
            width = launch.tile.step if loop in report.full else launch.tile.edge
            loop.flops = PRODUCTS[kernel] * 2 * launch.tile.own * width * block_d(head_dim)
    spills, hot, work = sum(loop.count(SPILL) for loop in report.full), report.hot, 1.0
    if hot is not None and hot.matrix_flops and kernel in ("forward", "dq", "dkv"):
        work = hot.matrix_flops / (PRODUCTS[kernel] * 2 * launch.tile.own * launch.tile.step * block_d(head_dim))
    return {
        "tile": list(launch.tile[:4]), "registers": report.registers, "stack": report.stack, "shared": report.shared,
        "occupancy": report.occupancy, "limit": report.limit, "spills": spills,
        "edge_spills": report.spills_in_loops - spills, "atomics": report.atomics,
        "selects": max((loop.count(SELECT) for loop in report.full), default=0),
        "matrix": sorted(
            {op.split(".")[0] for loop in report.loops for op, _ in loop.instructions if MATRIX.search(op)}
        ),
        "cycles": {} if hot is None else {pipe: round(c) for pipe, c in hot.cycles().items()},
        "work": round(work, 3), "serial": None if hot is None else round(hot.serial / work, 3),
        "overlap": None if hot is None else round(hot.overlap / work, 3),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def matrix(
    cases: Iterable[CallKind], targets: Iterable[str], dims: Iterable[int], dtypes: Iterable[torch.dtype]
) -> Iterator[Any]:
    """(key, launch, target, D) of every distinct binary."""
    seen = set()
    for head_dim, dtype, target, case in itertools.product(dims, dtypes, targets, cases):
        for launch in record(case, target, head_dim, dtype):
            source = specialise(launch.kernel, launch.arguments, target)
            binary = (source.hash(), launch.tile, target)
            if binary not in seen:
                seen.add(binary)
                yield (
                    f"{label(launch)} | {case.name} | {target} | {head_dim} | {DTYPES[dtype]}",
                    launch,
                    target,
                    head_dim,
                )


DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
