"""The movie snippets: sentences of film reviews with a sentiment (credit and licence in data/movie_snippets)."""

from __future__ import annotations

import json
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "movie_snippets_data"
FOLDER = _INSTALLED if _INSTALLED.exists() else _HERE.parent / "data" / "movie_snippets"
LABELS = ("positive", "negative")


def read(split: str) -> list[dict[str, str]]:
    """Rows `{"text", "label"}` of the "train" or "test" split."""
    with open(FOLDER / f"movie_snippets.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
