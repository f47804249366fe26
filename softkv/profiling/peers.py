"""Other Triton attention kernels, through the same compiler and the same analysis as softkv's.

Each peer's own launcher is called on meta tensors, and its launches are recorded instead of run, so that the peer
chooses tiles, warps and the specialisation of arguments for the target. For an autotuned kernel, the largest tile is
compiled with 4 and with 8 warps, and the better bound counts. Peers are optional: missing ones are listed with the
command that installs them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from softkv.profiling.machines import MACHINES
from softkv.profiling.static import DTYPES, Candidate, compile_kernel

B, H, T = 4, 16, 2048  # of the recorded call; binaries hardly depend on it
WARPS = (4, 8)


@dataclass(frozen=True)
class Pass:
    label: str  # same names as softkv's passes, so that they are compared
    tile: tuple[str, str]  # constexprs whose product is the number of scores per pass of the hot loop
    products: int = 0  # matrix products per score; 0 if loops with different numbers share a kernel


@dataclass(frozen=True)
class Peer:
    package: str
    install: str
    call: Callable[[int, torch.dtype, str], None]
    passes: dict[str, Pass]  # by the kernel's name


@dataclass(frozen=True)
class RecordedPeer:
    kernel: JITFunction
    arguments: dict[str, Any]
    warps: int
    stages: int


def available(peer: Peer) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """The peers that are not installed, each with the command that installs it."""
    return [f"{peer.package} is not installed: {peer.install}" for peer in PEERS if available(peer) is None]


def subjects(targets: list[str], dims: list[int], dtype: str) -> Iterator[list[Candidate]]:
    """The kernels of every installed peer, with one list per kernel of its configurations."""
    for peer in PEERS:
        version = available(peer)
        if version is None:
            continue
        for target in targets:
            for head_dim in dims:
                with recording() as launches, redirect_stdout(sys.stderr):
                    peer.call(head_dim, DTYPES[dtype], target)
                by_pass: dict[str, list[Candidate]] = {}
                for launch in launches:
                    what = peer.passes.get(launch.kernel.__name__)
                    if what is not None:
                        made = _subject(f"{peer.package} {version}", what, launch, target, head_dim, dtype)
                        by_pass.setdefault(what.label, []).append(made)
                yield from by_pass.values()


def _subject(source: str, what: Pass, launch: RecordedPeer, target: str, head_dim: int, dtype: str) -> Candidate:
    own, step = (launch.arguments[name] for name in what.tile)
    scores = own * step
    if {
        "V",
        "BV",
    } <= launch.arguments.keys():  # fla: a program computes some columns of the output, and all scores again
        scores = scores * launch.arguments["BV"] // launch.arguments["V"]
    return Candidate(
        source=source,
        kernel=what.label,
        case="causal",
        target=target,
        head_dim=head_dim,
        dtype=dtype,
        tile=f"{own}×{step}, {launch.warps}w {launch.stages}s",
        compile=partial(compile_kernel, launch.kernel, launch.arguments, target, launch.warps, launch.stages),
        scores=scores,
        products=what.products,
    )


@contextmanager
def recording() -> Iterator[list[RecordedPeer]]:
    """Record Triton's launches; nothing is compiled or run."""
    launches: list[RecordedPeer] = []

    def run(kernel: JITFunction, *values: Any, grid: Any = None, warmup: bool = False, **named: Any) -> None:
        arguments = {p.name: p.default for p in kernel.params if p.has_default}
        arguments |= dict(zip(kernel.arg_names, values, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        launches.append(RecordedPeer(kernel, arguments, named.get("num_warps", 4), named.get("num_stages", 3)))

    def tuned(tuner: Autotuner, *values: Any, **named: Any) -> None:
        def area(config: Any) -> int:
            return math.prod(value for value in config.kwargs.values() if isinstance(value, int))

        for warps in WARPS:
            configs = [config for config in tuner.configs if config.num_warps == warps]
            if configs:
                best = max(configs, key=lambda config: (area(config), -config.num_stages))
                tuner.fn.run(*values, **named, **best.all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", tuned):
        yield launches


def _tensors(head_dim: int, dtype: torch.dtype, *, heads_last: bool) -> list[torch.Tensor]:
    shape = (B, T, H, head_dim) if heads_last else (B, H, T, head_dim)
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for _ in range(3)]


def _fla(head_dim: int, dtype: torch.dtype, target: str) -> None:
    module: Any = importlib.import_module("fla.ops.attn.parallel")
    needs = {"hopper": 227 * 1024, "ampere": 163 * 1024}

    def fits(arch: str = "none", *_: Any) -> bool:
        return MACHINES[target].shared_limit >= needs.get(arch, 0)

    q, k, v = (x.detach() for x in _tensors(head_dim, dtype, heads_last=True))
    with mock.patch.object(module, "check_shared_mem", fits):
        out, lse = module.parallel_attn_fwd(q, k, v, None, None, head_dim**-0.5)
        module.parallel_attn_bwd(q, k, v, out, None, lse, out, scale=head_dim**-0.5)


def _tutorial(head_dim: int, dtype: torch.dtype, target: str) -> None:
    name = "triton.tools.experimental_descriptor"  # imported there but not used; removed from later Triton versions
    with mock.patch.dict(sys.modules, {name: sys.modules.get(name) or ModuleType(name)}):
        module: Any = importlib.import_module("flash_attn_triton.triton_kernel.attention_kernel")
    out = module._attention.apply(*_tensors(head_dim, dtype, heads_last=False), True, head_dim**-0.5, 0.0, 0)
    out.backward(torch.empty_like(out))


def _aule(head_dim: int, dtype: torch.dtype, target: str) -> None:
    module: Any = importlib.import_module("aule.triton_flash")
    out = module.FlashAttentionTritonFunc.apply(*_tensors(head_dim, dtype, heads_last=False), True)
    out.backward(torch.empty_like(out))


PEERS = (
    Peer(
        "fla-core",
        "pip install fla-core",
        _fla,
        {
            "parallel_attn_fwd_kernel": Pass("forward", ("BT", "BS"), 2),
            "parallel_attn_bwd_kernel_dq": Pass("dq", ("BT", "BS"), 3),
            "parallel_attn_bwd_kernel_dkv": Pass("dkv", ("BT", "BS"), 4),
        },
    ),
    Peer(
        "flash-attn-triton",  # the Triton tutorial's fused attention; brings a package called flash_attn, too
        "pip install --no-deps --target DIR flash-attn-triton einops, with PYTHONPATH=DIR",
        _tutorial,
        {
            "_attn_fwd": Pass("forward", ("BLOCK_M", "BLOCK_N"), 2),
            "_attn_bwd": Pass("backward", ("BLOCK_M1", "BLOCK_N1")),
        },
    ),
    Peer(
        "aule-attention",
        "pip install --no-deps aule-attention",
        _aule,
        {
            "_flash_attn_fwd_kernel": Pass("forward", ("BLOCK_M", "BLOCK_N"), 2),
            "_flash_attn_bwd_kernel": Pass("backward", ("BLOCK_M", "BLOCK_N"), 5),
        },
    ),
)
