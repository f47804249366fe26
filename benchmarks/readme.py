"""`python -m benchmarks.readme`: writes the measured tables of README.md from the committed results.

Its figures come from nowhere else: a test compares.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

DEMO = """\
## Measured

`make demo`: SmolLM2-135M-Instruct, sentiment of film review snippets, {steps} steps of {batch} rows; accuracy on
{test_rows} test rows with Wilson's 95 % interval; peak memory of a process each. PEFT ran the same job from its own
start; it has no method with one K/V pair for all layers, and its prompts stand before the text. {device}.

| method | trainable | accuracy before | after | s / step | peak GiB | PEFT s / step | PEFT GiB |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""
TRAIN = """\
`python -m benchmarks.train`: a training step of 16 rows beside PEFT doing the same job, and beside the floor (the same
packed tokens without a prefix, backward to the input embeddings). Interleaved, median of {steps} timed steps, ratios
round by round, peak memory of a process each. {device}.

| case | softkv s / step | PEFT s / step | floor s / step | softkv is faster by | softkv GiB | PEFT GiB |
|---|---:|---:|---:|---:|---:|---:|
{rows}
"""
ATTENTION = """\
`python -m benchmarks.attention`: the op beside the fastest `scaled_dot_product_attention` over really concatenated keys
and values; {mode}. {device}.

| B | H | G | T | P | D | softkv ms | concatenated ms | softkv is faster by |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""


def rendered(readme: str) -> str:
    """The README with its tables made anew."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join([_demo(), _train(), *_attention()]) + END + after


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _device(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, fp32, torch {machine['torch']}, {machine['date'][:10]}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _demo() -> str:
    content = _read("demo")
    rows = []
    for result in content["results"].values():
        peer = result.get("peft")
        rows.append(
            _row(
                result["title"],
                f"{result['parameters']:,}",
                percent(result["before"]),
                percent(result["after"]),
                *_figures(result, "{:.2f}"),
                *(_figures(peer, "{:.2f}") if peer else ("—", "—")),
            )
        )
    return DEMO.format(rows="\n".join(rows), device=_device(content), **content["settings"])


def _figures(result: dict[str, Any], form: str) -> tuple[str, str]:
    return form.format(result["seconds_a_step"]), form.format(result["peak_gib"])


def percent(accuracy: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = accuracy["interval"]
    return f"{accuracy['value']:.3f} [{low:.2f}, {high:.2f}]"


def _train() -> str:
    content = _read("train")
    rows = []
    for result in content["results"].values():
        seconds = {name: f"{statistics.median(times):.2f}" for name, times in result["seconds"].items()}
        faster = result["speedup_of_softkv"].get("PEFT")
        peaks = {name: f"{peak:.2f}" for name, peak in result["peak_gib"].items()}
        rows.append(
            _row(
                result["case"]["title"],
                *(seconds.get(name, "—") for name in ("softkv", "PEFT", "floor")),
                f"{faster['median']:.1f}×" if faster else "—",
                *(peaks.get(name, "—") for name in ("softkv", "PEFT")),
            )
        )
    steps = min(result["steps"] for result in content["results"].values())
    return TRAIN.format(rows="\n".join(rows), device=_device(content), steps=steps)


def _attention() -> list[str]:
    content = _read("attention")
    modes = {
        "forward + backward": ("cat", "forward and backward to q, k, v and the shared prefix"),
        "decoding": ("cat cached", "decoding one token, beside an already concatenated cache"),
    }
    tables = []
    for mode, (rival, words) in modes.items():
        rows = []
        for result in content["results"]:
            if result["mode"] == mode:
                milliseconds = (result["ms"][name]["median"] for name in ("softkv", result["best"][rival]))
                faster = result["speedup"][rival]["median"]
                axes = (result["shape"][axis] for axis in "BHGTPD")
                rows.append(_row(*axes, *(f"{ms:.2f}" for ms in milliseconds), f"{faster:.2f}×"))
        tables.append(ATTENTION.format(rows="\n".join(rows), mode=words, device=_device(content)))
    return tables


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
