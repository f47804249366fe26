"""Every causal language model of transformers, tiny and random, with every method: `python -m benchmarks.models`.

Writes benchmarks/results/models.json, an entry at a time, and docs/models.md. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .results import FOLDER, read_json, write_json

RESULTS = FOLDER / "models.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SECONDS, GIB = 120, 4  # an entry's own
COLUMNS = ("P-tuning v2", "Prefix-tuning", "Prompt-tuning, after", "Prompt-tuning, before", "P-tuning", "text")
_PRELOADED = ["softkv", "transformers.models.llama.modeling_llama", "benchmarks.model_checks"]


def entries() -> dict[str, str]:
    """Model types of transformers' causal-LM mapping, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names}


def run(names: Iterable[str], path: Path = RESULTS, progress: bool = True) -> dict[str, Any]:
    """Checks entries, each in a process of its own, and puts their records into the file."""
    classes = entries()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    content = read_json(path) if path.exists() else {"results": {}}
    for name in names:
        record = _in_process(context, classes[name])
        content["results"][name] = {"class": classes[name], "run": _versions()} | record
        content["results"] = {kind: content["results"][kind] for kind in sorted(content["results"])}
        write_json(path, content)
        if progress:
            print(f"{name}: {summary(content['results'][name])}", flush=True)
    return content


def _in_process(context: Any, class_name: str) -> dict[str, Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(class_name, theirs), daemon=True)
    process.start()
    theirs.close()
    record = None
    try:
        if ours.poll(SECONDS):
            record = ours.recv()
    except EOFError:
        record = {"not built": f"its process ended: more than {GIB} GiB, or a crash of the interpreter"}
    process.kill()
    process.join()
    return record or {"not built": f"it took more than {SECONDS} seconds"}


def _serve(class_name: str, pipe: Any) -> None:
    import warnings

    import transformers

    from .model_checks import check_model

    resource.setrlimit(resource.RLIMIT_DATA, (GIB << 30, GIB << 30))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pipe.send(check_model(class_name))


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"date": time.strftime("%Y-%m-%d"), "transformers": transformers.__version__, "torch": torch.__version__}


# What is said of them -------------------------------------------------------------------------------------------------


def outcome(checks: dict[str, str]) -> str:
    """The worst of a method's checks: "wrong", "crash", "refused" or "✔"; what the bare model can't do counts for
    nothing."""
    for kind in ("wrong", "crash"):
        if any(said.startswith(kind) for said in checks.values()):
            return kind
    if checks.get("attach", "ok").startswith("refused") or checks.get("text in context", "ok").startswith("refused"):
        return "refused"
    if any(
        said.startswith("base") for check, said in checks.items() if check in ("truth", "effect", "text in context")
    ):
        return "no truth"
    return "✔"


def summary(record: dict[str, Any]) -> str:
    if "not built" in record:
        return f"not built: {record['not built']}"
    said = []
    for name, checks in record["checks"].items():
        notes = [f"{check} {what}" for check, what in checks.items() if what != "ok"]
        said.append(f"{name} {outcome(checks)}" + (f" ({'; '.join(notes)})" if notes else ""))
    return "; ".join(said)


def kind_of(record: dict[str, Any] | None) -> str:
    """One word for an entry: the worst of its methods, a text start aside where it is refused."""
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


_ABOUT = """\
# Models

The {number} entries of transformers' causal-LM mapping, as tiny random models: {counted}.
Run: {runs}.

✔: logits of rows alone, padded on either side and packed, gradients, `generate` with dynamic and static caches,
`save_pretrained` and `load`, `disabled()` and `detach()` are right: as of the bare model in fp32 with eager attention
that has the soft tokens in its row, or the prefix in its cache. *text*: a text as a prefix answers as the text in
context. *refused*: `softkv.attach` or `Prefix.from_text` says so in the sentence noted. *no truth*: the bare model
can't be run in a way that would tell. A note beside ✔ says what the bare model can't do either. `make models` makes
this page.

"""


def page(results: dict[str, Any]) -> str:
    """docs/models.md: a row for each entry, and notes."""
    rows: list[str] = []
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        number = notes.setdefault(text, len(notes) + 1)
        return f"[{number}](#note-{number})"

    for name, class_name in sorted(entries().items()):
        record = results.get(name)
        if record is None or "not built" in record:
            why = "not run" if record is None else f"not built {note(_escaped(record['not built']))}"
            cells = [why] + [""] * (len(COLUMNS) - 1)
        else:
            cells = [_cell(record["checks"].get(column, {}), note, class_name) for column in COLUMNS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    runs = sorted({" · ".join(f"{key} {value}" for key, value in one["run"].items()) for one in results.values()})
    kinds = Counter(kind_of(results.get(name)) for name in entries())
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    about = _ABOUT.format(number=len(entries()), counted=counted, runs="; ".join(runs))
    table = [f"| model type | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", *rows]
    said = [f'<a id="note-{number}"></a>{number}. {text}' for text, number in notes.items()]
    return about + "\n".join(table) + "\n\n## Notes\n\n" + "\n\n".join(said) + "\n"


def _cell(checks: dict[str, str], note: Any, class_name: str) -> str:
    kind = outcome(checks)
    others: dict[str, list[str]] = {}  # notes by what they say
    for check, said in checks.items():
        if said != "ok":
            others.setdefault(said.replace(class_name, "the model"), []).append(check)
    marks = [note(_escaped(said if kind == "refused" else f"{', '.join(at)}: {said}")) for said, at in others.items()]
    return " ".join([kind, *marks])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="model types to run again, by name; * stands for anything")
    parser.add_argument("--limit", type=int, help="run at most so many")
    parser.add_argument("--again", action="store_true", help="run those too that have been run")
    parser.add_argument("--page", action="store_true", help="only write docs/models.md from what is there")
    wish = parser.parse_args()
    known = read_json(RESULTS)["results"] if RESULTS.exists() else {}
    chosen = [name for name in entries() if wish.only is None or any(fnmatch(name, one) for one in wish.only)]
    if not chosen:
        parser.error(f"no model type is called {', '.join(wish.only)}")
    if wish.only is None and not wish.again:
        chosen = [name for name in chosen if name not in known]
    results = known if wish.page else run(chosen[: wish.limit])["results"]
    PAGE.write_text(page(results), encoding="utf-8")
    kinds = {name: kind_of(results.get(name)) for name in entries()}
    print(Counter(kinds.values()))
    return int(any(kind in ("wrong", "crash") for kind in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
