"""docs/models.md: one table per task, one row per entry, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from .entries import TASKS, entries
from .methods import METHODS

COLUMNS = (*METHODS, "text")
PEERS = ("✔", "wrong if padded", "wrong", "error")
Checks = dict[str, str]

ABOUT = """\
# Models

Every entry of transformers' mappings, as a tiny random model with every method, and PEFT's methods on the same models.
`make models` generates this page.

{summary}

- **✔**: single rows, rows padded on either side and (causal) packed rows, gradients, `generate` with dynamic and static
  caches, `save_pretrained` and `load`, `disabled()` and `detach()` are right. The reference is the bare model in fp32
  with eager attention, with the soft tokens in its row, or the prefix in its cache or before its keys. A note gives
  what the bare model can't do either, or what is refused.
- **text**: a text as a prefix gives the same results as the text in the context.
- **refused**: `softkv.attach` or `Prefix.from_text` raises the error in the note.
- **no truth**: the bare model can't be run in a way that gives a reference.
- **PEFT**: its prefix tuning, prompt tuning and P-tuning on right-padded rows, gradients and `generate`: right, wrong
  results without an error (*if padded*: rows of equal length are right), or an error.
- **Images and audio**: one in each row, `generate` with a dynamic cache.

The summary counts each entry by the worst result among its methods. Run: {runs}.
"""


def outcome(checks: Checks) -> str:
    """The worst of a method's checks: "wrong", "crash", "error", "refused", "no truth" or "✔". What the bare model
    can't do does not count."""
    for kind in ("wrong", "crash", "error"):
        if any(said.startswith(kind) for said in checks.values()):
            return kind
    if checks.get("attach", "ok").startswith("refused") or checks.get("text in context", "ok").startswith("refused"):
        return "refused"
    if any(said.startswith("base") for check, said in checks.items() if check in _TELLING):
        return "no truth"
    return "✔"


_TELLING = ("truth", "effect", "text in context", "row alone")


def summary(record: dict[str, Any]) -> str:
    if "not built" in record:
        return f"not built: {record['not built']}"
    said = []
    for name, checks in record["checks"].items():
        notes = [f"{check} {what}" for check, what in checks.items() if what != "ok"]
        said.append(f"{name} {outcome(checks)}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "; ".join([*said, *([f"PEFT: {peers(record)}"] if "PEFT" in record else [])])


def peers(record: dict[str, Any]) -> str:
    return ", ".join(_peer(checks) for checks in record.get("PEFT", {}).values())


def _peer(checks: Checks) -> str:
    """PEFT's outcome: "wrong if padded" where rows of equal length are right."""
    found = outcome(checks)
    if found == "wrong" and not any(checks[name].startswith("wrong") for name in checks if "padded" not in name):
        return "wrong if padded"
    return found


def kind_of(record: dict[str, Any] | None) -> str:
    """The outcome of an entry: the worst of its methods; a refused start from a text does not count."""
    if record is None:
        return "not run"
    if "not built" in record:
        return "not built"
    outcomes = [outcome(checks) for checks in record["checks"].values()]
    for kind in ("wrong", "crash"):
        if kind in outcomes:
            return kind
    methods = [outcome(checks) for name, checks in record["checks"].items() if name != "text"]
    if "no truth" in methods:
        return "no truth"
    if set(methods) == {"✔"}:
        return "right"
    return "right where not refused" if "✔" in methods else "refused"


def counts(results: dict[str, Any]) -> str:
    """The table in README.md: how many entries of each mapping are right."""
    heads = ["", "swept", "right", "right where not refused", "refused", "not built", "wrong"]
    heads += ["PEFT: right", "wrong if padded", "wrong", "error"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for task, about in TASKS.items():
        known, names = results.get(task, {}), entries(task)
        kinds = Counter(kind_of(known.get(name)) for name in names)
        found = [kinds[kind] for kind in ("right", "right where not refused", "refused")]
        rest = kinds["not built"] + kinds["no truth"]
        theirs = Counter(_worst(record) for record in known.values() if "PEFT" in record)
        peft = [theirs[kind] if about.peft else "—" for kind in PEERS]
        swept = f"{len(names) - kinds['not run']} of {len(names)}"
        cells = [about.title, swept, *found, rest, kinds["wrong"] + kinds["crash"], *peft]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _worst(record: dict[str, Any]) -> str:
    """The worst of PEFT's methods."""
    outcomes = [_peer(checks) for checks in record["PEFT"].values()]
    return next((kind for kind in ("wrong", "error", "no truth", "wrong if padded") if kind in outcomes), "✔")


def page(results: dict[str, Any]) -> str:
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        number = notes.setdefault(text, len(notes) + 1)
        return f"[{number}](#note-{number})"

    tables = [_table(task, results.get(task, {}), note) for task in TASKS]
    made = [record["run"] for records in results.values() for record in records.values()]
    runs = sorted({" · ".join(f"{key} {value}" for key, value in one.items()) for one in made})
    said = [f'<a id="note-{number}"></a>{number}. {text}' for text, number in notes.items()]
    about = ABOUT.format(summary=counts(results), runs="; ".join(runs))
    return "\n".join([about, *tables, "## Notes\n", "\n\n".join(said), ""])


def _table(task: str, results: dict[str, Any], note: Callable[[str], str]) -> str:
    columns = [name for name in COLUMNS if task == "causal" or name != "text"]
    heads = [*columns, *(["PEFT"] if TASKS[task].peft else [])]
    lines = [f"## {TASKS[task].title}\n", f"| model type | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, class_name in sorted(entries(task).items()):
        record = results.get(name)
        if record is None:
            continue
        if "not built" in record:
            cells = [f"not built {note(_escaped(record['not built']))}"] + [""] * (len(heads) - 1)
        else:
            cells = [_cell(record["checks"].get(column, {}), note, class_name) for column in columns]
            cells += [peers(record)] * (len(heads) - len(columns))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(checks: Checks, note: Callable[[str], str], class_name: str) -> str:
    kind = outcome(checks)
    others: dict[str, list[str]] = {}  # notes by what they say
    for check, said in checks.items():
        if said != "ok":
            others.setdefault(said.replace(class_name, "the model"), []).append(check)
    marks = [note(_escaped(said if kind == "refused" else f"{', '.join(at)}: {said}")) for said, at in others.items()]
    return " ".join([kind, *marks])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")
