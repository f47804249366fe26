"""Runs each entry in a separate process, so that a crash or growing memory affects only that entry."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..results import read_json, write_json
from .entries import check, entries
from .page import summary

SECONDS, GIB = 600, 4  # an entry's own
_PRELOADED = ["softkv", "peft", "transformers.models.llama.modeling_llama", "benchmarks.models.entries"]


def run(chosen: Iterable[tuple[str, str]], path: Path) -> dict[str, Any]:
    """Checks entries (task, model type), and puts their records into the file, one by one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    content = read_json(path) if path.exists() else {"results": {}}
    for task, name in chosen:
        class_name = entries(task)[name]
        record = {"class": class_name, "run": _versions()} | _in_process(context, task, class_name)
        records = content["results"].setdefault(task, {})
        records[name] = record
        content["results"][task] = {kind: records[kind] for kind in sorted(records)}
        write_json(path, content)
        print(f"{task} {name}: {summary(record)}", flush=True)
    return content


def _in_process(context: Any, task: str, class_name: str) -> dict[str, Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(task, class_name, theirs), daemon=True)
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


def _serve(task: str, class_name: str, pipe: Any) -> None:
    import warnings

    import transformers

    resource.setrlimit(resource.RLIMIT_DATA, (GIB << 30, GIB << 30))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pipe.send(check(task, class_name))


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    found = {"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__}
    return {"date": time.strftime("%Y-%m-%d")} | found
