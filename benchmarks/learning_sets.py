"""The data sets of `benchmarks/learning.py` (credit and licences in learning_data and movie_snippets_data)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from . import movie_snippets

FOLDER = Path(__file__).resolve().parent / "learning_data"
SHORT = 90  # characters of a film review's snippet: about as long as the other sets' rows


@dataclass(frozen=True)
class DataSet:
    """A task.

    Attributes:
        name: of its files.
        template: of a row.
        instruction: what a text as a start says.
        classes: the answers, or none where the answer is a name in the text (exact match).
    """

    name: str
    template: str
    instruction: str
    classes: tuple[str, ...] = ()

    def read(self, split: str) -> list[dict[str, str]]:
        """Rows `{"text", "label"}` of the "train" or "test" split."""
        if self.name == "movies":
            return [row for row in movie_snippets.read(split) if len(row["text"]) <= SHORT]
        with open(FOLDER / f"{self.name}.{split}.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


SETS = {
    one.name: one
    for one in (
        DataSet(
            "movies",
            "Review: [text]\nSentiment: [Y]",
            "Is the sentiment of the film review positive or negative?\n",
            ("negative", "positive"),
        ),
        DataSet(
            "glosses",
            "Definition: [text]\nTopic: [Y]",
            "What is defined: an animal, a plant, food, a body part, or an object?\n",
            ("animal", "body", "food", "object", "plant"),
        ),
        DataSet(
            "sources",
            "Text: [text]\nSource: [Y]",
            "Is the text from a film review, a product review, the news, or a tweet?\n",
            ("film", "news", "product", "tweet"),
        ),
        DataSet("countries", "Place: [text]\nCountry: [Y]", "In which country or state is the place?\n"),
    )
}

# No rate, start or number of steps was ever chosen on it.
UNSEEN = {
    "verbs": DataSet(
        "verbs",
        "Definition: [text]\nKind: [Y]",
        "What kind of act is defined: thought, speech, emotion, motion, or possession?\n",
        ("emotion", "motion", "possession", "speech", "thought"),
    )
}
