"""Measured tiles: on request, on a GPU, stored on disk. Without a call of `tune` or `load`, the table is used.

    from softkv.kernels.tuning import load, tune
    tune(q, k, v, prefix_k, prefix_v, file="tiles.json")  # once: times each pass with each candidate
    load("tiles.json", q)  # later: no timing

Measurements apply to one device, Triton version, padded head dim and dtype; the table is used for others. Tiles change
only inside these two calls, which refuse to run during CUDA graph capture, so that a captured call can't use two
different tiles.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

import softkv.kernels as engine
from softkv.kernels.launch import interpreter_enabled, target_of
from softkv.kernels.tiles import MEASURED, TABLE, Tile, block_d, tile

Timer = Callable[[Callable[[], Any]], float]  # a call → milliseconds
BACKWARD = ("dq", "dkv", "dkv_prefix")
OPTIONS: dict[str, Any] = dict.fromkeys(
    ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
     "max_seqlen_k", "sinks", "window", "softcap")
) | {"is_causal": True, "window_covers_prefix": False}  # fmt: skip


def device_of(x: Tensor) -> str:
    """The device and Triton version that a measurement applies to."""
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"
    return f"{name}, triton {triton.__version__}"


def candidates(name: str, arch: str, head_dim: int, dtype: torch.dtype, default: Tile) -> Iterator[Tile]:
    """The table's row first, then the rows of this pass for all architectures, with one stage less and more."""
    seen = {default[:4]}
    yield default
    for (other, _), rows in TABLE.items():
        if other not in (name, name.removesuffix("_prefix")) or max(rows) < block_d(head_dim):
            continue
        row = rows[min(d for d in rows if d >= block_d(head_dim))]
        for stages in (row.stages, row.stages - 1, row.stages + 1):
            option = row._replace(stages=stages, why="measured")
            if stages > 0 and option[:4] not in seen:
                seen.add(option[:4])
                yield option


def tune(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, *,
    file: str | os.PathLike[str], timer: Timer | None = None, **options: Any,
) -> dict[str, Tile]:  # fmt: skip
    """Time every pass of forward and backward for these operands with each candidate tile; use and keep the fastest.

    Shapes and `options` as in `softkv.prefix_attention` (packed: with cu_seqlens_q, …); use those of the intended
    workload. `file`: a JSON file to extend; its entries for this device are not timed again. `timer`: by default
    triton's `do_bench`. Returns the tiles by pass. RuntimeError without a GPU, or during CUDA-graph capture.
    """
    if timer is None:
        if not q.is_cuda:
            where = "the interpreter" if interpreter_enabled() else q.device
            raise RuntimeError(
                f"tune: expected tensors on a GPU, got {where}: there is nothing to time; use the table's tiles"
            )
        timer = triton.testing.do_bench
    _refuse_capture("tune")
    options = OPTIONS | {"scale": q.shape[-1] ** -0.5} | options
    needs = (True, True, True, prefix_k is not None, prefix_k is not None, options["sinks"] is not None)
    out, lse = engine.forward(q, k, v, prefix_k, prefix_v, **options)

    def forward() -> Any:
        return engine.forward(q, k, v, prefix_k, prefix_v, **options)

    def backward() -> Any:
        return engine.backward(out, None, out, lse, q, k, v, prefix_k, prefix_v, needs=needs, **options)

    target, chosen = target_of(q), {}
    queries = options["max_seqlen_q"] or q.shape[2]
    first = "decode" if queries <= engine.MOST_QUERIES else "forward"
    load(file, q)
    passes = BACKWARD if prefix_k is not None else BACKWARD[:-1]
    for name, run in ((first, forward), *((name, backward) for name in passes)):
        key = (name, target.arch, block_d(q.shape[-1]), q.dtype)
        if key not in MEASURED:
            default = tile(name, target, q.shape[-1], q.dtype)
            MEASURED[key] = _fastest(key, candidates(*key[:2], q.shape[-1], q.dtype, default), run, timer)
        chosen[name] = MEASURED[key]
    _save(Path(file), device_of(q))
    return chosen


def _fastest(key: Any, options: Iterator[Tile], run: Callable[[], Any], timer: Timer) -> Tile:
    times: dict[Tile, float] = {}
    try:
        for option in options:
            MEASURED[key] = option
            try:
                times[option] = timer(run)
            except OutOfResources:  # more shared memory or registers than this device has
                continue
    finally:
        del MEASURED[key]
    return min(times, key=times.__getitem__)


def load(file: str | os.PathLike[str], like: Tensor) -> int:
    """Use the tiles stored by `tune` for the device of `like`; returns the number of passes, 0 if the file is
    missing."""
    _refuse_capture("load")
    path = Path(file)
    kept = json.loads(path.read_text()).get(device_of(like), {}) if path.exists() else {}
    for text, row in kept.items():
        name, arch, head_dim, dtype = text.split(" | ")
        MEASURED[name, arch, int(head_dim), getattr(torch, dtype)] = Tile(*row, "measured")
    return len(kept)


def _save(path: Path, device: str) -> None:
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[device] = {
        f"{name} | {arch} | {head_dim} | {str(dtype).removeprefix('torch.')}": list(row[:4])
        for (name, arch, head_dim, dtype), row in MEASURED.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(everything, indent=1) + "\n")
    temporary.replace(path)


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what}: expected no CUDA graph being captured: choose tiles before the capture")
