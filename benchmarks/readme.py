"""`python -m benchmarks.readme`: writes the tables of results in README.md and docs/ from the committed files.

A table is delimited by `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a key of `TABLES`. A test checks
that the pages match the results.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import encoders, gpu_tables, host, learning_report, static_bounds, trainers
from .figures import geometric_means, of_peak
from .models import page as models
from .results import FOLDER, read_json

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cold", "hot")
HOW_DECODING = (
    "Heads of SmolLM2-135M, 128 cached tokens per row; medians of single calls (cold) and of repeated calls (hot)."
)
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)
Records = dict[str, Any]

DEMO = """\
`make demo`: SmolLM2-135M-Instruct, sentiment of film review snippets, {steps} steps of {batch} rows; accuracy on
{test_rows} test rows with Wilson 95 % intervals; peak memory, one process per run. PEFT ran the same job from its own
initialisation; it has no method with one K/V pair for all layers, and puts its prompts before the text. {device}.

| method | trainable | accuracy before | after | s / step | peak GiB | PEFT s / step | PEFT GiB |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""
TRAIN = """\
`softkv bench train`: a training step of 16 rows, compared with PEFT on the same job and with the floor (the same packed
tokens without a prefix, backward to the input embeddings). Interleaved; median of {steps} timed steps, ratios per
round; peak memory, one process per run. {device}.

| case | softkv s / step | PEFT s / step | floor s / step | softkv is faster by | softkv GiB | PEFT GiB |
|---|---:|---:|---:|---:|---:|---:|
{rows}
"""
ATTENTION = """\
`softkv bench attention`: {what}. {how}
{device}.

| {axes} | softkv ms | % of peak | cat ms | no prefix ms | softkv is faster by | softkv MiB | cat MiB |
|{lines}---:|---:|---:|---:|---:|---:|---:|
{rows}
"""
DECODING = """\
`softkv bench attention`: {what}.
{how}
{device}.

| {axes} | softkv ms cold | hot | concatenated ms cold | hot | faster cold | hot | no prefix ms cold | hot |
|{lines}---:|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""
GENERATE = """\
`softkv bench generate`: 16 prompts of real text after one shared prefix of P slots, 32 new tokens each, greedy. PEFT's
prefix tuning holds the same values and gave the same tokens. Interleaved; median of {rounds} rounds; peak memory, one
process per run. {device}.

| P | softkv tokens / s | PEFT tokens / s | no prefix tokens / s | softkv is faster than PEFT by | time, no prefix = 1 | softkv GiB | PEFT GiB |
|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""  # noqa: E501

ADAPTERS = """\
`softkv bench adapters`: 16 prompts of real text, P-tuning v2 prefixes of 64 slots, SmolLM2-135M-Instruct; rows per
second, {what}. "One by one" switches to each adapter in turn and runs its rows; PEFT holds the same values.
All gave the same tokens. Interleaved; median of at least {rounds} rounds. {device}.

| adapters | softkv, one batch | softkv, one by one | PEFT, one by one | faster than one by one | than PEFT |
|---:|---:|---:|---:|---:|---:|
{rows}
"""

STEP_PROFILE = """\
`python -m benchmarks.step_profile`: a training step of 16 packed film review snippets with P-tuning v2, P=64,
SmolLM2-135M-Instruct, under torch.profiler; mean of {steps} steps. {device}.

| | ms a step | share |
|---|---:|---:|
{rows}
"""


def rendered(text: str) -> str:
    """The document with its tables regenerated."""

    def table(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise ValueError(f"no table is called {block[2]!r}: expected one of {', '.join(TABLES)}")
        return block[1] + TABLES[block[2]]() + block[3]

    return BLOCK.sub(table, text)


def documents() -> list[Path]:
    """README.md and the pages of docs/ that contain tables."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [page for page in pages if BLOCK.search(page.read_text(encoding="utf-8"))]


def _records(name: str, keep: Callable[[Any], bool] = lambda record: True) -> Records:
    results = read_json(FOLDER / f"{name}.json")["results"]
    return {name: record for name, record in results.items() if keep(record)}


def _devices(machines: list[dict[str, Any]], dtype: str) -> str:
    """One description per distinct machine."""
    words = [
        f"{one.get('gpu') or one['cpu']}, {one['cores']} cores, {dtype}, torch {one['torch']}, {one['date'][:10]}"
        for one in machines
    ]
    return "; ".join(dict.fromkeys(words))


def _of_records(records: Records) -> str:
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return "; ".join(
        dict.fromkeys(_devices([one["machine"]], dtype[one["settings"]["dtype"]]) for one in records.values())
    )


def _span(records: Records, key: str) -> str:
    """The value of `key` over the records: "2", or "1 to 3" where they differ."""
    low, high = (pick(record[key] for record in records.values()) for pick in (min, max))
    return str(low) if low == high else f"{low} to {high}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def percent(accuracy: dict[str, Any]) -> str:
    """An accuracy with its confidence interval."""
    low, high = accuracy["interval"]
    return f"{accuracy['value']:.3f} [{low:.2f}, {high:.2f}]"


def _demo() -> str:
    content = read_json(FOLDER / "demo.json")
    rows = []
    for result in content["results"].values():
        peer = result.get("peft")
        rows.append(
            _row(
                result["title"],
                f"{result['parameters']:,}",
                percent(result["before"]),
                percent(result["after"]),
                *(f"{result[name]:.2f}" for name in ("seconds_a_step", "peak_gib")),
                *(f"{peer[name]:.2f}" if peer else "—" for name in ("seconds_a_step", "peak_gib")),
            )
        )
    return DEMO.format(rows="\n".join(rows), device=_devices([content["machine"]], "fp32"), **content["settings"])


def _train() -> str:
    records = _records("train")
    rows = []
    for record in records.values():
        seconds = {name: f"{statistics.median(times):.2f}" for name, times in record["seconds"].items()}
        faster = record["speedup_of_softkv"].get("PEFT")
        peaks = {name: f"{peak:.2f}" for name, peak in record["peak_gib"].items()}
        rows.append(
            _row(
                record["case"]["title"],
                *(seconds.get(name, "—") for name in ("softkv", "PEFT", "floor")),
                f"{faster['median']:.1f}×" if faster else "—",
                *(peaks.get(name, "—") for name in ("softkv", "PEFT")),
            )
        )
    return TRAIN.format(rows="\n".join(rows), device=_of_records(records), steps=_span(records, "steps"))


def _generate() -> str:
    records = _records("generate")
    rows = []
    for record in records.values():
        case, faster = record["case"], record["speedup_of_softkv"]
        tokens = case["rows"] * case["new_tokens"]
        rates = {name: f"{tokens / statistics.median(times):.1f}" for name, times in record["seconds"].items()}
        rows.append(
            _row(
                case["P"],
                *(rates.get(name, "—") for name in ("softkv", "PEFT", "no prefix")),
                f"{faster['PEFT']['median']:.2f}×" if "PEFT" in faster else "—",
                f"{1 / faster['no prefix']['median']:.2f}",
                *(f"{record['peak_gib'][name]:.2f}" if name in rates else "—" for name in ("softkv", "PEFT")),
            )
        )
    return GENERATE.format(rows="\n".join(rows), device=_of_records(records), rounds=_span(records, "rounds"))


def _adapters(mode: str, what: str) -> str:
    records = _records("adapters", lambda one: one["case"]["mode"] == mode)
    rows = []
    for record in records.values():
        seconds = (statistics.median(times) for times in record["seconds"].values())
        faster = (one["median"] for one in record["speedup_of_softkv"].values())
        rows.append(
            _row(
                record["case"]["adapters"],
                *(f"{record['case']['rows'] / one:.1f}" for one in seconds),
                *(f"{ratio:.2f}×" for ratio in faster),
            )
        )
    rounds = min(len(record["seconds"]["softkv"]) for record in records.values())
    return ADAPTERS.format(rows="\n".join(rows), what=what, rounds=rounds, device=_of_records(records))


def _axes(axes: str) -> dict[str, str]:
    return {"axes": " | ".join(axes), "lines": "---:|" * len(axes)}


def _attention(sweep: str, what: str, mode: str = "forward + backward", axes: str = "BHGTPD") -> str:
    """One sweep in one mode compared with concatenation, timed cold."""
    records = _records("attention", lambda one: (one["case"]["sweep"], one["case"]["mode"]) == (sweep, mode))
    rows = []
    for record in records.values():
        ours, theirs, floor = (record["providers"][name] for name in (record["ours"], "cat", "no prefix"))
        rows.append(
            _row(
                *(record["case"]["shape"][axis] for axis in axes),
                f"{ours['cold']['ms']['median']:.2f}",
                f"{100 * of_peak(record, record['ours']):.0f}",
                *(f"{one['cold']['ms']['median']:.2f}" for one in (theirs, floor)),
                f"{theirs['cold']['speedup_of_ours']['median']:.2f}×",
                *(f"{one['working_mib']:.0f}" for one in (ours, theirs)),
            )
        )
    mean = geometric_means(records).get(mode)
    how = "Single calls, median." + (f" Geometric mean {mean:.2f}×." if mean else "")
    return ATTENTION.format(rows="\n".join(rows), what=what, how=how, device=_of_records(records), **_axes(axes))


def _decoding(sweep: str, what: str, axes: str = "BP") -> str:
    """One decoding sweep compared with a cache that already holds the prefix, cold and hot."""
    records = _records("attention", lambda one: one["case"]["sweep"] == sweep)
    rows = []
    for record in records.values():
        ours, cached, floor = (record["providers"][name] for name in (record["ours"], "cat cached", "no prefix"))

        def times(one: dict[str, Any]) -> list[str]:
            return [f"{one[kind]['ms']['median']:.2f}" for kind in KINDS]

        rows.append(
            _row(
                *(record["case"]["shape"][axis] for axis in axes),
                *times(ours),
                *times(cached),
                *(f"{cached[kind]['speedup_of_ours']['median']:.2f}×" for kind in KINDS),
                *times(floor),
            )
        )
    return DECODING.format(
        rows="\n".join(rows), what=what, how=HOW_DECODING, device=_of_records(records), **_axes(axes)
    )


def _step_profile() -> str:
    content = read_json(FOLDER / "step_profile.json")
    times = content["milliseconds_a_step"]
    total = sum(times.values())
    rows = "\n".join(_row(name, f"{value:.0f}", f"{value / total:.0%}") for name, value in times.items())
    return STEP_PROFILE.format(rows=rows, steps=content["steps"], device=_devices([content["machine"]], "fp32"))


CAT = (
    "forward and backward to q, k, v and the prefix, compared with the fastest\nSDPA over concatenated keys and values"
)
CACHED = "one token per row, compared with SDPA over a cache that already holds the prefix in every row"
TABLES: dict[str, Callable[[], str]] = {
    "models": lambda: models.counts(_records("models")) + "\n",
    "demo": _demo,
    "train": _train,
    "step-profile": _step_profile,
    "trainers": trainers.table,
    "generate": _generate,
    "host": host.table,
    "adapters-generation": lambda: _adapters("generation", "generating 8 tokens each, greedy"),
    "adapters-forward": lambda: _adapters("forward", "one forward pass"),
    "attention-training": lambda: _attention("training", f"training shapes; {CAT}"),
    "attention-forward": lambda: _attention("training", "training shapes, forward alone", "forward"),
    "attention-decoding": lambda: _decoding("decoding", CACHED),
    "attention-prefix": lambda: _attention("prefix", f"growing P; {CAT}"),
    "attention-batch": lambda: _attention("batch", f"growing B; {CAT}"),
    "attention-tokens": lambda: _attention("tokens", f"growing T; {CAT}"),
    "attention-bank": lambda: _attention("bank", f"a bank of A prefixes; {CAT}", axes="BHGTPDA"),
    "attention-decoding-prefix": lambda: _decoding("decoding-prefix", f"growing P; {CACHED}"),
    "attention-decoding-batch": lambda: _decoding("decoding-batch", f"growing B; {CACHED}"),
    "attention-decoding-bank": lambda: _decoding("decoding-bank", f"a bank of A prefixes; {CACHED}", axes="BPA"),
    **gpu_tables.TABLES,
    "learning": learning_report.learning_table,
    "learning-peers": learning_report.peers_table,
    "learning-variants": learning_report.variants_table,
    "learning-times": learning_report.times_table,
    "learning-command": learning_report.command_table,
    "learning-rates": learning_report.rates_table,
    "learning-starts": learning_report.starts_table,
    "encoders": encoders.table,
    "static-bounds": static_bounds.table,
    "static-published": static_bounds.published,
    "kernel-bounds": static_bounds.kernels,
}


def main() -> None:
    for page in documents():
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
