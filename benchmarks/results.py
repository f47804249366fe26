"""Results on disk: one JSON file per benchmark with one record per case, which includes the machine and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softkv.profiling.files import write_whole

FOLDER = Path(__file__).resolve().parent / "results"


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def merge(path: Path, records: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """Writes records into a file, in place of those of the same cases; the others stay, in the order of the cases."""
    known = (read_json(path)["results"] if path.exists() else {}) | records
    names = [name for name in order if name in known] + [name for name in known if name not in order]
    content = {"results": {name: known[name] for name in names}}
    write_json(path, content)
    return content
