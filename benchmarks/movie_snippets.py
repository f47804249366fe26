"""The movie snippets: sentences of film reviews with a sentiment (credit and licence in movie_snippets_data)."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "movie_snippets_data"
LABELS = ("positive", "negative")


def read(split: str) -> list[dict[str, str]]:
    """Rows `{"text", "label"}` of the "train" or "test" split."""
    with open(FOLDER / f"movie_snippets.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
