"""Every model of transformers' mappings, tiny and random, with every method: `python -m benchmarks.models`.

Writes benchmarks/results/models.json, one entry at a time, and docs/models.md. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from ..results import FOLDER, read_json
from .entries import TASKS, entries
from .page import kind_of, page
from .processes import run

RESULTS = FOLDER / "models.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only these mappings")
    parser.add_argument("--only", action="append", help="model types to run again, by name; * matches anything")
    parser.add_argument("--limit", type=int, help="maximum number of entries to run")
    parser.add_argument("--again", action="store_true", help="also run entries that have results")
    parser.add_argument("--page", action="store_true", help="only write docs/models.md from existing results")
    wish = parser.parse_args()
    known = read_json(RESULTS)["results"] if RESULTS.exists() else {}
    chosen = [
        (task, name)
        for task in wish.task or TASKS
        for name in entries(task)
        if wish.only is None or any(fnmatch(name, one) for one in wish.only)
    ]
    if not chosen:
        parser.error(f"no model type is called {', '.join(wish.only)}")
    if wish.only is None and not wish.again:
        chosen = [(task, name) for task, name in chosen if name not in known.get(task, {})]
    results = known if wish.page else run(chosen[: wish.limit], RESULTS)["results"]
    PAGE.write_text(page(results), encoding="utf-8")
    failed = 0
    for task, about in TASKS.items():
        kinds = Counter(kind_of(results.get(task, {}).get(name)) for name in entries(task))
        failed += kinds["wrong"] + kinds["crash"]
        print(f"{about.title}: {', '.join(f'{number} {kind}' for kind, number in kinds.most_common())}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
