"""The records of all parts as one page, short enough to be read and copied as a whole."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from . import BenchmarkPart

MOST = 9_900  # characters
_CUT = "… cut here: the rest is in the JSON files"


def of(results: Mapping[BenchmarkPart, dict[str, Any]], about: dict[str, Any]) -> str:
    """Each part gets its lines; what is too long is cut in the longest part first."""
    head = ["# softkv bench gpu", "", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    texts = {part: _section(part, records) for part, records in results.items()}
    room = MOST - sum(len(line) + 1 for line in head)
    share = _share([len(text) for text in texts.values()], room)
    return "\n".join([*head, ""]) + "".join(_cut(text, share) for text in texts.values())


def _section(part: BenchmarkPart, results: dict[str, Any]) -> str:
    module = importlib.import_module(part.module)
    good = {job: record for job, record in results.items() if "error" not in record}
    failed = [f"- {job}: {record['error']}" for job, record in results.items() if "error" in record]
    lines = module.lines(good) if good else []
    return "\n".join([f"## {part.title}", "", *(lines or failed or ["not run"]), *(failed if lines else []), "", ""])


def _share(lengths: list[int], room: int) -> int:
    """The most characters of a part, so that all of them fit: short ones leave their rest to the long ones."""
    for i, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - i)
        if length > share:
            return share
        room -= length
    return max(lengths, default=0)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    kept = text[: max(0, most - len(_CUT) - 3)].rsplit("\n", 1)[0]
    return f"{kept}\n{_CUT}\n\n"
