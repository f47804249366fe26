"""Records as tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import of_peak
from .timing import Spread


@dataclass(frozen=True)
class Grid:
    """A title, columns, rows of text, and what to say below."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str]


def of_attention(name: str, record: dict[str, Any]) -> Grid:
    kinds = list(record["rounds"])
    timed = [heading for kind in kinds for heading in (f"{kind} ms [80 %]", "softkv is faster by")]
    rows = []
    for provider, one in record["providers"].items():
        cells = []
        for kind in kinds:
            ours = provider == record["ours"]
            cells += [_spread(one[kind]["ms"], 3), "" if ours else f"{one[kind]['speedup_of_ours']['median']:.2f}×"]
        memory = "—" if one["working_mib"] is None else f"{one['working_mib']:.1f}"
        ms = one["cold"]["ms"]["median"]
        rates = [f"{1e3 * one['gflop'] / ms:.0f}", f"{one['mbyte'] / ms:.0f}"]
        rates.append(f"{100 * of_peak(record, provider):.0f}" if record["peak"] else "—")
        title = f"{provider} ({one['variant']})" if one["variant"] else provider
        rows.append((title, *cells, *rates, memory))
    columns = ("provider", *timed, "GFLOP/s", "GB/s", "% of peak", "working MiB")
    return Grid(name, columns, rows, _absent(record))


def of_training(name: str, record: dict[str, Any]) -> Grid:
    case, tokens = record["case"], record["useful_tokens_a_step"]
    columns = ("provider", "s / step [80 %]", "softkv is faster by", "rows / s", "tokens / s", "peak GiB", "first loss")
    rows = [
        (
            provider,
            _spread(vars(seconds), 2),
            ratio,
            f"{case['rows'] / seconds.median:.2f}",
            f"{tokens / seconds.median:.0f}",
            f"{record['peak_gib'][provider]:.2f}",
            f"{record['first_loss'][provider]:.4f}",
        )
        for provider, seconds, ratio in _timed(record)
    ]
    return Grid(f"{name}: {case['title']}", columns, rows, _absent(record))


def of_generation(name: str, record: dict[str, Any]) -> Grid:
    case = record["case"]
    tokens = case["rows"] * case["new_tokens"]
    columns = ("provider", "s [80 %]", "softkv is faster by", "new tokens / s", "peak GiB")
    rows = [
        (
            provider,
            _spread(vars(seconds), 2),
            ratio,
            f"{tokens / seconds.median:.1f}",
            f"{record['peak_gib'][provider]:.2f}",
        )
        for provider, seconds, ratio in _timed(record)
    ]
    return Grid(f"{name}: {case['title']}", columns, rows, _absent(record))


def of_adapters(name: str, record: dict[str, Any]) -> Grid:
    case = record["case"]
    rows = [
        (provider, _spread(vars(seconds), 2), ratio, f"{case['rows'] / seconds.median:.1f}")
        for provider, seconds, ratio in _timed(record)
    ]
    title = f"{name}: {case['rows']} rows, {case['adapters']} adapters, P={case['P']}"
    return Grid(title, ("provider", "s [80 %]", "softkv is faster by", "rows / s"), rows, _absent(record))


GRIDS: dict[str, Callable[[str, dict[str, Any]], Grid]] = {
    "attention": of_attention,
    "train": of_training,
    "generate": of_generation,
    "adapters": of_adapters,
}


def _timed(record: dict[str, Any]) -> Iterator[tuple[str, Spread, str]]:
    """(provider, its seconds, softkv's speed-up in words)."""
    for provider, sample in record["seconds"].items():
        ratio = record["speedup_of_softkv"].get(provider)
        yield provider, Spread.of(sample), "" if ratio is None else f"{ratio['median']:.2f}×"


def _spread(of: dict[str, float], digits: int) -> str:
    return f"{of['median']:.{digits}f} [{of['low']:.{digits}f}–{of['high']:.{digits}f}]"


def _absent(record: dict[str, Any]) -> list[str]:
    """A line for each reason why providers did not run."""
    names: dict[str, list[str]] = {}
    for provider, reason in record.get("absent", {}).items():
        names.setdefault(reason, []).append(provider)
    return [f"not run: {', '.join(providers)}: {reason}" for reason, providers in names.items()]
