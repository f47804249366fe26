"""The GPU tables of the documentation, from `results/gpu/`, with the device and the date."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .results import FOLDER, read_json

OP = """\
Eager calls at shapes taken from models, {device}: TFLOP/s of useful work, higher is better.
At D = 64 and for short rows softkv's calls are host-bound: under a CUDA graph its forward at D = 64 reaches 199.

| B,H,G,T,P,D | softkv fwd | cat + FA2 | cat + Flex | no prefix, FA2 | no prefix, cuDNN | softkv fwd + bwd | cat + FA2 | cat + Flex | no prefix, FA2 | no prefix, cuDNN | softkv MiB | cat + FA2 MiB |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""  # noqa: E501
PASSES = """\
Individual passes under a CUDA graph, {device}: milliseconds (TFLOP/s of the pass's own matrix products).

| B,H,G,T,P,D | forward | dq | dk and dv of tokens | dPrefix |
|---|---:|---:|---:|---:|
{rows}
"""
DECODING = """\
One token per row under a CUDA graph, {device}: milliseconds.
"Cached": SDPA over a cache that holds the prefix in every row.

| B,H,G,P,S,D | softkv | cached | faster by | no prefix, softkv | no prefix, SDPA | bytes at 3 TB/s |
|---|---:|---:|---:|---:|---:|---:|
{rows}
"""
MODELS = """\
Llama shapes with random weights, {device}:
a training step (16 rows of 64 to 512 tokens on 1B, 8 on 8B, P = 128; milliseconds and peak GiB), and generation after a
prefix of P = 2048 (32 prompts of 128 tokens, 24 new tokens; tokens per second and peak GiB). "Bare": no soft prompt; in
training, padded rows with backward to the input embeddings. The host took 148 µs per attention call forward and 2 ms
forward and backward (SDPA: 18 and 150 µs), which is why generation and training a prompt "before" were slower than with
PEFT.

| | softkv | PEFT | bare |
|---|---:|---:|---:|
{rows}
"""
HOST = """\
Host time of one eager call in microseconds, B=2 H=8 G=2 T=64 P=16 D=64, {device}.

| call | softkv | SDPA |
|---|---:|---:|
{rows}
"""
TILES = """\
Tiles (own×step, warps, stages): TFLOP/s of the pass, {device}; causal, P = 256.

| D | pass | in use at the time | best measured | candidates |
|---:|---|---|---|---:|
{rows}
"""
_NAMES = {"forward": "forward", "dq": "dq", "dkv": "dk and dv of tokens", "dprefix": "dPrefix"}


def op() -> str:
    content = _read("op")
    rows = []
    for shape, ways in content["training"].items():
        cells = [
            _cell(ways.get(way), key)
            for key in ("tf_fwd", "tf_fb")
            for way in ("softkv", "cat+flash", "flex cat", "floor flash", "floor cudnn")
        ]
        rows.append(_row(shape, *cells, *(_cell(ways.get(way), "mib") for way in ("softkv", "cat+flash"))))
    return OP.format(rows="\n".join(rows), device=_device(content))


def passes() -> str:
    content = _read("op")
    rows = [_row(shape, *(_pass(of.get(name)) for name in _NAMES)) for shape, of in content["passes_by_graph"].items()]
    return PASSES.format(rows="\n".join(rows), device=_device(content))


def decoding() -> str:
    content = _read("op")
    rows = []
    for shape, ways in content["decoding"].items():
        ours, cached = (ways[name]["graph_ms"] for name in ("softkv", "cached sdpa"))
        floors = (f"{ways[name]['graph_ms']:.4f}" for name in ("floor softkv", "floor sdpa"))
        floor = f"{ways['bytes_floor_ms_at_3TBs']:.4f}"
        rows.append(_row(shape, f"{ours:.4f}", f"{cached:.4f}", f"{cached / ours:.2f}×", *floors, floor))
    return DECODING.format(rows="\n".join(rows), device=_device(content))


def models() -> str:
    content = _read("models")
    jobs, later = content["jobs"], content["later"]
    rows = []
    for name in ("1B", "8B"):
        job = next(job for job in jobs if job.startswith(f"train,{name}"))
        found = jobs[job]
        peers = {"before": "PEFT prompt"}
        for way, title in (
            ("softkv v2 packed", "P-tuning v2, packed"),
            ("softkv v2 padded", "P-tuning v2, padded"),
            ("softkv v2 packed ckpt", "P-tuning v2, packed, checkpointing"),
            ("softkv prefix packed", "prefix-tuning, packed"),
            ("softkv prompt before packed", 'prompt-tuning "before", packed'),
        ):
            samples = [found[way], *([later[job][way]] if way in later.get(job, {}) else [])]
            ms = " to ".join(f"{one:.0f}" for one in sorted(sample[0] for sample in samples))
            peer = None if "prefix packed" in way or "ckpt" in way else found[peers.get(way.split()[2], "PEFT prefix")]
            bare = found["padded no prefix (to embeddings)"]
            cells = (_pair(one, "ms") if one else "—" for one in (peer, bare))
            rows.append(_row(f"{name}, {title}", f"{ms} ms, {found[way][1]:.1f} GiB", *cells))
    for name in ("1B", "8B"):
        job = f"gen,{name},32,2048,128,24"
        measured = [found[job] for found in (jobs, later) if job in found]
        ways: dict[str, list[list[float]]] = {}
        for one in measured:
            for way, sample in one.items():
                ways.setdefault(way, []).append(sample)
        rows.append(_row(f"{name}, generate", *(_speed(ways[way]) for way in ("softkv", "peft", "none"))))
        if static := ways.get('softkv, cache_implementation="static"'):
            rows.append(_row(f'{name}, generate, `cache_implementation="static"`', _speed(static), "—", "—"))
    return MODELS.format(rows="\n".join(rows), device=_device(content))


def host() -> str:
    content = _read("host")
    rows = [_row(one["call"], one["softkv"], one["sdpa"] or "—") for one in content["rows"]]
    return HOST.format(rows="\n".join(rows), device=_device(content))


def tiles() -> str:
    content = _read("tiles")
    rows = []
    for name, sweep in content["sweeps"].items():
        for one, title in _NAMES.items():
            ran = sorted((row for row in sweep if row[1] == one and row[3] is not None), key=lambda row: row[3])
            then = content["then"][name][one]
            known = [row for row in ran if row[2] == then]
            own = _tile(then) + (f": {known[0][4]:.0f}" if known else "")
            best = " · ".join(f"{_tile(row[2])}: {row[4]:.0f}" for row in ran[:3])
            rows.append(_row(name.removeprefix("D = "), title, own, best, len(ran)))
    return TILES.format(rows="\n".join(rows), device=_device(content))


TABLES: dict[str, Callable[[], str]] = {
    "gpu-op": op,
    "gpu-passes": passes,
    "gpu-decoding": decoding,
    "gpu-models": models,
    "gpu-host": host,
    "gpu-tiles": tiles,
}


def _read(name: str) -> dict[str, Any]:
    return read_json(FOLDER / "gpu" / f"{name}.json")


def _device(content: dict[str, Any]) -> str:
    one = content["machine"]
    return f"{one['gpu']}, bf16, torch {one['torch']}, triton {one['triton']}, {one['date']}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cell(way: Any, key: str) -> str:
    return f"{way[key]:.0f}" if isinstance(way, dict) else "—"


def _pass(times: list[float] | None) -> str:
    return f"{times[0]:.3f} ({times[1]:.0f})" if times else "—"


def _pair(sample: list[float], unit: str) -> str:
    return f"{sample[0]:.0f} {unit}, {sample[1]:.1f} GiB"


def _speed(samples: Iterable[list[Any]]) -> str:
    samples = list(samples)
    speed = " to ".join(f"{one:.0f}" for one in sorted(sample[0] for sample in samples))
    memory = [sample[1] for sample in samples if sample[1] is not None]
    return speed + (f", {statistics.median(memory):.1f} GiB" if memory else "")


def _tile(tile: list[int]) -> str:
    own, step, warps, stages = tile
    return f"{own}×{step}, {warps}, {stages}"
